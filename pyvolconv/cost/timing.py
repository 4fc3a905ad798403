"""Wall-clock time of a callable, robust against the noise of a shared machine.

Candidates that are to be compared are interleaved in one process: frequency, temperature and neighbours then
change under all of them alike, which separate runs do not give.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """How long a callable took, in seconds.

    Attributes:
        seconds: every timed run, in the order of running; warm-up runs are not among them.

    Example:
        >>> timing = Timing((0.3, 0.1, 0.2))
        >>> timing.median, timing.min
        (0.2, 0.1)
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle run: what a user meets."""
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        """The fastest run: what the machine can do undisturbed."""
        return min(self.seconds)

    def to_dict(self) -> dict[str, object]:
        """Runs, median and minimum as plain values for JSON, seconds."""
        return {**asdict(self), "median": self.median, "min": self.min}


def time_step(step: Callable[[], object], warmup: int = 2, repeats: int = 7) -> Timing:
    """Times of `repeats` calls of `step` after `warmup` untimed ones; waits for CUDA where it is in use.

    Raises:
        ValueError: `repeats` is not positive.

    Example:
        >>> len(time_step(lambda: sum(range(100)), warmup=1, repeats=3).seconds)
        3
    """
    return alternate({"step": step}, repeats, warmup)["step"]


def alternate(steps: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 1) -> dict[str, Timing]:
    """Times of several callables, one call of each per round, so that all meet the same machine.

    Every second round runs in reverse order, so that no candidate always follows the same neighbour.

    Args:
        steps: name and callable of each candidate.
        rounds: timed calls of each.
        warmup: untimed calls of each before the first round.

    Raises:
        ValueError: `rounds` is not positive.

    Example:
        >>> sorted(alternate({"a": lambda: None, "b": lambda: None}, rounds=2))
        ['a', 'b']
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one timed call is needed")
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            start = now()
            steps[name]()
            seconds[name].append(now() - start)
        order.reverse()
    return {name: Timing(tuple(runs)) for name, runs in seconds.items()}


def now() -> float:
    """Seconds of a monotonic clock, after all work queued on a CUDA device in use has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
