"""Time on a GPU: events around several calls that rotate over operands which no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CACHES = 3
"""Operands take this many times the last-level cache, all sets together."""
MOST_SETS = 64
SAMPLE_SECONDS = 5e-4
"""One sample holds as many calls as take about this long: an event costs some microseconds itself."""
MOST_SAMPLES = 40
FEWEST_CALLS = 5
LONG_SECONDS = 0.2
"""A call that takes longer is timed once."""

Call = Callable[..., object]


def operand_sets(operands: Sequence[Tensor], memory_share: float = 0.15) -> list[list[Tensor]]:
    """The operands and as many copies of them as their rotation needs to leave no operand in a cache."""
    total = sum(operand.nbytes for operand in operands)
    if not operands[0].is_cuda:
        return [list(operands)]
    device = torch.cuda.get_device_properties(operands[0].device)
    room = int(memory_share * device.total_memory / total)
    sets = max(1, min(-(-CACHES * device.L2_cache_size // total), MOST_SETS, room))
    return [list(operands), *([operand.clone() for operand in operands] for _ in range(sets - 1))]


@dataclass
class Runner:
    """A callable that takes the sets of operands in turns, and what its calls took.

    Attributes:
        call: takes the operands of a set.
        sets: of operands, dense.
        first: seconds of the first call, with all that is compiled or searched for in it.
        once: seconds of the second one, the time that the host takes to start it included.
        samples: seconds per call of the timed samples.
    """

    call: Call
    sets: list[list[Tensor]]
    first: float = 0.0
    once: float = 0.0
    host: float = 0.0
    calls: int = 0
    samples: list[float] = field(default_factory=list)

    def start(self) -> object:
        """Two calls that do not count; returns the result of the first."""
        begin = _now()
        result = self.call(*self.sets[0])
        self.first = _now() - begin
        begin = _now()
        self.call(*self.sets[-1])
        self.host = time.perf_counter() - begin
        self.once = _now() - begin
        return result

    @property
    def seconds(self) -> float:
        """The median; without a timed sample the second call."""
        return statistics.median(self.samples) if self.samples else self.once

    def finished(self, seconds: float) -> bool:
        if not self.samples:
            return False
        enough = self.calls >= FEWEST_CALLS and self.calls * self.seconds >= seconds
        return enough or self.seconds > LONG_SECONDS or len(self.samples) >= MOST_SAMPLES

    def sample(self) -> None:
        """Time as many calls as one sample holds."""
        calls = max(1, min(MOST_SETS, round(SAMPLE_SECONDS / self.seconds)))
        sets = [self.sets[(self.calls + nth) % len(self.sets)] for nth in range(calls)]
        if self.sets[0][0].is_cuda:
            # The device sleeps while the host starts the calls, and then runs them without waiting for the host.
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(2e9 * min(0.01, 1.5 * calls * self.host)))
            begin.record()
            for operands in sets:
                self.call(*operands)
            end.record()
            end.synchronize()
            taken = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            for operands in sets:
                self.call(*operands)
            taken = time.perf_counter() - start
        self.calls += calls
        self.samples.append(taken / calls)


def time_in_turns(runners: Sequence[Runner], seconds: float) -> None:
    """A sample of each by turns, every second round in reverse, until each has run for about `seconds`."""
    running = [runner for runner in runners if not runner.finished(seconds)]
    while running:
        for runner in running:
            runner.sample()
        running = [runner for runner in reversed(running) if not runner.finished(seconds)]


def matmul_rates(side: int = 8192, device: str = "cuda") -> Mapping[str, float]:
    """FLOP/s of torch's own product of two square matrices of random numbers by dtype; float32 in TF32."""
    rates = {}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for dtype in ("bfloat16", "float16", "float32"):
            a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
            runner = Runner(torch.mm, [[a, b]])
            runner.start()
            time_in_turns([runner], 0.1)
            rates[dtype] = 2 * side**3 / runner.seconds
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
