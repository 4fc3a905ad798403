"""How much of the machine other processes took during a measurement.

Linux counts for every core the time that it did not idle, guests of the same host included ("steal"), and for every
process its own. The difference is what others took, and where it leaves a process fewer cores than it has threads, its
times are longer than on a quiet machine.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
TOLERATED = 0.1
"""Cores missing, per thread, from which on a measurement counts as disturbed."""
SHORTEST = 0.2
"""Seconds from which on the system's ticks, of 10 ms for each core, are fine enough for that."""

_IDLE, _IO_WAIT, _STEAL = 3, 4, 7


@dataclass(frozen=True)
class Sample:
    """Seconds since some moment in the past: on the clock, of this process's CPU time, of all cores' busy time.

    Programs that it ran to their end, compilers above all, count as its own.
    `cores` is how many cores this process may use, the ones that are counted.
    """

    clock: float
    own: float
    busy: float
    cores: int


@dataclass(frozen=True)
class Load:
    """Mean over a measurement: cores that others kept busy, of `cores` that this process may use."""

    others: float
    cores: int

    @classmethod
    def between(cls, before: Sample, after: Sample) -> Load:
        """The load between two samples; the same process took both."""
        elapsed = after.clock - before.clock
        others = (after.busy - before.busy) - (after.own - before.own)
        # Both counts are rounded to ticks.
        return cls(min(max(others / elapsed, 0.0), after.cores) if elapsed > 0 else 0.0, after.cores)

    def missing(self, threads: int) -> float:
        """Cores that `threads` threads would have needed and others had."""
        return max(0.0, min(threads, self.cores) - (self.cores - self.others))

    def disturbs(self, threads: int) -> bool:
        """Whether that is enough to make times longer."""
        return self.missing(threads) > TOLERATED * threads


def disturbance(before: Sample | None, after: Sample | None, threads: int) -> Load | None:
    """The load between two samples where it made the times of `threads` threads longer.

    None on a quiet machine, on one that has no samples, and after too short a time to tell.
    """
    if before is None or after is None or after.clock - before.clock < SHORTEST:
        return None
    load = Load.between(before, after)
    return load if load.disturbs(threads) else None


def sample(stat: Path = STAT) -> Sample | None:
    """What has been used until now; None where the system does not count it this way (other than Linux)."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    mine = os.sched_getaffinity(0)
    ticks = 0
    for line in lines:
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in mine:
            # Guests' time, at the end, is counted in user time already.
            spent = [int(count) for count in counts[: _STEAL + 1]]
            ticks += sum(spent) - spent[_IDLE] - spent[_IO_WAIT]
    children = os.times()
    own = time.process_time() + children.children_user + children.children_system
    return Sample(time.monotonic(), own, ticks / os.sysconf("SC_CLK_TCK"), len(mine))
