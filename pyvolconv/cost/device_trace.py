"""The time that a GPU spends on every operator of a step, by events on its queue.

Kernels run long after the host has asked for them, and where the host is slower than the GPU, as it is with small
kernels, the GPU waits in between. Events around an operator therefore hold its own time only while the GPU has a queue
to work on: before the step it is given an empty kernel, long enough for the host to queue the whole step behind it.
Whether it was long enough is checked, and else a longer one is tried. No profiler library takes part, so a step is
taken apart in the same way on every GPU, whoever wrote its kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .assignment import Assigner, Assignment
from .attribution import Attribution
from .trace import Call, Spent, StepTrace, call_of, convolution_backward_in_parts, does_both_gradients

_EMPTY_INTERVALS = 8
_TRIALS = 4
_CYCLES_PER_SECOND = 2e9
"""At least what a GPU's clock does, so that an empty kernel lasts no shorter than asked for."""


class DeviceClock(Protocol):
    """Marks on the queue of a device, whose times can be read when the device has passed them."""

    def hold(self, seconds: float) -> None:
        """Keep the device from working on what is queued from now on, for about so long."""

    def mark(self) -> Any:
        """A point in the queue."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has come to a mark."""

    def finish(self) -> None:
        """Wait for the device to come to the end of its queue."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that were passed."""


class CudaClock:
    """Events on the current stream of the calling thread, which in backward is the stream of forward."""

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * _CYCLES_PER_SECOND))

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def finish(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e-3


@dataclass(frozen=True)
class DeviceTrace:
    """One step: the device's time of every operator, and whether it had all of them queued before it began.

    Where it had not, times may include waiting for the host.
    """

    trace: StepTrace
    queued: bool


def trace_on_device(
    step: Callable[[], object], model: nn.Module, clock: DeviceClock, *, split: bool = False
) -> DeviceTrace:
    """Run one step until the device had all of it queued, at most `_TRIALS` times, and take its operators' times.

    Args:
        step: one training step of `model`, which has run before, and which does not wait for the device.
        model: whose layers are told apart.
        clock: of the device where the model is.
        split: as of `trace.trace_step`.
    """
    began = time.perf_counter()
    found = _trace(step, model, clock, 0.0, split)
    hold = time.perf_counter() - began
    for _ in range(_TRIALS):
        # The first of them took as long as the host needs to queue the step, or longer.
        hold *= 2
        found = _trace(step, model, clock, hold, split)
        if found.queued:
            break
    return found


def _trace(step: Callable[[], object], model: nn.Module, clock: DeviceClock, hold: float, split: bool) -> DeviceTrace:
    with Attribution(model) as attribution:
        tracer = _DeviceTracer(attribution, clock, split)
        clock.finish()
        clock.hold(hold)
        held = clock.mark()
        empty = [(clock.mark(), clock.mark()) for _ in range(_EMPTY_INTERVALS)]
        with tracer:
            step()
        queued = not clock.passed(held)
        clock.finish()
    return DeviceTrace(tracer.trace(statistics.median(clock.seconds(*pair) for pair in empty)), queued)


@dataclass(frozen=True)
class _Interval:
    call: Call
    assigned: Assignment
    start: Any
    end: Any
    parts: Sequence[tuple[Any, Any]] = field(default_factory=tuple)


class _DeviceTracer(TorchDispatchMode):
    def __init__(self, attribution: Attribution, clock: DeviceClock, split: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._assigner = Assigner(attribution)
        self._clock = clock
        self._split = split
        self._intervals: list[_Interval] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parts: list[tuple[Any, Any]] = []
        start = self._clock.mark()
        if self._split and does_both_gradients(func, args):
            result = convolution_backward_in_parts(args, lambda part: self._timed(part, parts))
        else:
            result = func(*args, **(kwargs or {}))
        end = self._clock.mark()
        assigned = self._assigner.assign(func, args, result)
        self._intervals.append(_Interval(call_of(assigned), assigned, start, end, parts))
        return result

    def _timed(self, part: Callable[[], Any], parts: list[tuple[Any, Any]]) -> Any:
        start = self._clock.mark()
        result = part()
        parts.append((start, self._clock.mark()))
        return result

    def trace(self, empty: float) -> StepTrace:
        """The sums by call; `empty` seconds lie between two marks with nothing in between."""

        def seconds(start: Any, end: Any) -> float:
            return max(self._clock.seconds(start, end) - empty, 0.0)

        trace = StepTrace()
        for one in self._intervals:
            spent = trace.calls.setdefault(one.call, Spent())
            spent.add_work(seconds(one.start, one.end), one.assigned.works)
            if one.parts:
                sums = trace.parts.setdefault(one.call, tuple(Spent() for _ in one.parts))
                for total, part in zip(sums, one.parts, strict=True):
                    total.add(seconds(*part), 0)
        trace.seconds = sum(spent.seconds for spent in trace.calls.values())
        return trace
