"""Where each millisecond of a training step goes, per layer and per pass.

The step runs under a dispatch mode that takes the time of every operator, forward and backward (autograd takes the
mode along to its own threads). On the CPU wall time is cut without remainder into
operators + framework (autograd, Python, freeing memory between operators) + the instrument itself.
On a GPU the time of an operator is what the GPU spends on it (`device_trace`), and what that leaves of the wall time of
a step is the GPU waiting for the host, which is kept as framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from torch import nn

from .device_trace import CudaClock, DeviceClock, trace_on_device
from .machine import Machine, measure_machine
from .timing import Timing, now
from .trace import Call, Spent, StepTrace, trace_step

_SPLIT_RUNS = 2
STEPS_AT_ONCE = 10
"""Steps in a row that a GPU is timed on, divided by their number: as in training, the host need not wait for each."""


@dataclass(frozen=True)
class StepEntry:
    """One operator of one layer in one pass; all its calls in a step together.

    Attributes:
        layer: qualified module name, "" for the model itself, or "loss", "optimizer", "step" (neither).
        kind: as in `counting.LayerCost.kind`, plus "memory" (zero-fill, copy).
        pass_: "forward", "grad_input", "grad_weight", "backward", "update"; "other" outside of them.
        op: operator, e.g. "aten.max_pool3d_with_indices".
        seconds: time of all calls, per step.
        calls: number of calls per step.
        flops, min_bytes: counted work of all calls, per step.
        page_faults: minor page faults of the whole process during the calls, per step.
        least_seconds: roofline lower bound of the work on `StepProfile.machine`.
        backend: name of the backend for a pyvolconv operator, "aten" etc. for the rest.
        problem: `str(ConvProblem)` of a convolution.
        split_estimated: True where one operator did two passes (aten.convolution_backward) and `seconds` is its time
            shared out as single-pass calls of it measured.
    """

    layer: str
    kind: str
    pass_: str
    op: str
    seconds: float
    calls: float
    flops: float
    min_bytes: float
    page_faults: float
    least_seconds: float
    backend: str
    problem: str | None
    split_estimated: bool

    @property
    def gflops_per_second(self) -> float:
        """Counted operations per time, GFLOP/s."""
        return self.flops / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def gbytes_per_second(self) -> float:
        """Least bytes per time, GB/s."""
        return self.min_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def roofline_share(self) -> float:
        """Lower bound over time taken: 1 is as fast as the machine allows (above: served from cache)."""
        return self.least_seconds / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """Attributes and rates as plain values for JSON."""
        return {
            **asdict(self),
            "gflops_per_second": self.gflops_per_second,
            "gbytes_per_second": self.gbytes_per_second,
            "roofline_share": self.roofline_share,
        }


@dataclass(frozen=True)
class StepSplit:
    """One training step in milliseconds: the three passes of all convolutions, and everything else."""

    forward: float
    grad_input: float
    grad_weight: float
    other: float

    @property
    def total(self) -> float:
        """Milliseconds of the whole step."""
        return self.forward + self.grad_input + self.grad_weight + self.other

    def to_dict(self) -> dict[str, float]:
        """The four parts and their total, milliseconds."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class StepProfile:
    """One training step, taken apart.

    `profiled_seconds == sum(entry.seconds) + framework_seconds + instrument_seconds`.

    Attributes:
        entries: every operator of every layer and pass, in the order of first running.
        framework_seconds: between operators, by phase ("forward", "backward", "update", "other"): autograd, Python,
            freeing memory (returning pages to the system happens here). On a GPU "other": nothing was queued there.
        framework_faults: page faults there, same keys.
        instrument_seconds: spent by the profiler itself.
        profiled_seconds: wall time of the step while profiled.
        step: the same step timed without the profiler, interleaved with profiled runs.
        machine: the ceilings used for `roofline_share`.
        queued: on a GPU, whether all of every profiled step was queued before the GPU began with it; where not, times
            of operators may include waiting for the host.
    """

    entries: tuple[StepEntry, ...]
    framework_seconds: dict[str, float]
    framework_faults: dict[str, float]
    instrument_seconds: float
    profiled_seconds: float
    step: Timing
    machine: Machine
    queued: bool = True

    def split(self) -> StepSplit:
        """The step as it runs without the profiler: convolutions' passes as profiled, the rest of it `other`."""
        return self.split_of(self.step.median)

    def profiled_split(self) -> StepSplit:
        """The step as it ran under the profiler, whose own time counts in `other`."""
        return self.split_of(self.profiled_seconds)

    def by_layer(self) -> dict[tuple[str, str], float]:
        """Seconds per (layer, pass), in the order of first running."""
        seconds: dict[tuple[str, str], float] = {}
        for entry in self.entries:
            key = entry.layer, entry.pass_
            seconds[key] = seconds.get(key, 0.0) + entry.seconds
        return seconds

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values for JSON; seconds, and milliseconds in both splits."""
        return {
            "entries": [entry.to_dict() for entry in self.entries],
            "framework_seconds": self.framework_seconds,
            "framework_faults": self.framework_faults,
            "instrument_seconds": self.instrument_seconds,
            "profiled_seconds": self.profiled_seconds,
            "step": self.step.to_dict(),
            "split_ms": self.split().to_dict(),
            "profiled_split_ms": self.profiled_split().to_dict(),
            "machine": self.machine.to_dict(),
            "queued": self.queued,
        }

    def split_of(self, total: float) -> StepSplit:
        """A step of `total` seconds with the convolutions' passes as profiled, the rest of it `other`."""
        passes = dict.fromkeys(("forward", "grad_input", "grad_weight"), 0.0)
        for entry in self.entries:
            if entry.kind == "conv" and entry.pass_ in passes:
                passes[entry.pass_] += 1e3 * entry.seconds
        return StepSplit(**passes, other=1e3 * total - sum(passes.values()))


def profile_step(
    step: Callable[[], object],
    model: nn.Module,
    *,
    repeats: int = 7,
    warmup: int = 2,
    machine: Machine | None = None,
    clock: DeviceClock | None = None,
) -> StepProfile:
    """Takes one training step apart.

    Args:
        step: runs one training step (zero_grad, forward, loss, backward, optimizer); called
            `warmup + 2 * repeats + 2` times on the CPU and some dozens of times on a GPU, so weights move on by as
            many steps. On a GPU it should not wait for its own results, as `loss.item()` does.
        model: the module whose layers are to be named.
        repeats: profiled runs, and as many unprofiled ones between them. Entries are the mean over the middle half of
            the profiled runs by wall time (interquartile mean), so that they still sum to the step's time.
        warmup: runs before the first timed one.
        machine: ceilings for the roofline; measured when not given, on the device of the model's parameters.
        clock: of the device where the step runs; left out, CUDA's where the model is on CUDA, else none.

    Raises:
        ValueError: `repeats` is not positive.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> profile = profile_step(lambda: layer(torch.ones(3, 4)).sum().backward(), layer, repeats=1)
        >>> sorted({entry.pass_ for entry in profile.entries if entry.kind == "linear"})
        ['forward', 'grad_weight']
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one profiled run is needed")
    device: Literal["cpu", "cuda"] = "cuda" if any(weight.is_cuda for weight in model.parameters()) else "cpu"
    if machine is None:
        machine = measure_machine(device)
    for _ in range(warmup):
        step()
    if device == "cuda" and clock is None:
        clock = CudaClock()
    if clock is not None:
        return _profile_on_device(step, model, repeats, machine, clock)
    splits = [trace_step(step, model, split=True) for _ in range(_SPLIT_RUNS)]
    traces, plain = [], []
    for _ in range(repeats):
        start = now()
        step()
        plain.append(now() - start)
        traces.append(trace_step(step, model))
    traces.sort(key=lambda trace: trace.seconds)
    middle = traces[repeats // 4 : repeats - repeats // 4]
    return _summarise(middle, splits, Timing(tuple(plain)), machine)


def _profile_on_device(
    step: Callable[[], object], model: nn.Module, repeats: int, machine: Machine, clock: DeviceClock
) -> StepProfile:
    splits = [trace_on_device(step, model, clock, split=True) for _ in range(_SPLIT_RUNS)]
    plain, found = [], []
    for _ in range(repeats):
        plain.append(_seconds_in_a_row(step, clock))
        found.append(trace_on_device(step, model, clock))
    timing = Timing(tuple(plain))
    busy = sorted((one.trace for one in found), key=lambda trace: trace.seconds)
    middle = busy[repeats // 4 : repeats - repeats // 4]
    for trace in middle:
        idle = max(timing.median - trace.seconds, 0.0)
        trace.between["other"] = Spent(idle)
        trace.seconds += idle
    profile = _summarise(middle, [one.trace for one in splits], timing, machine)
    return replace(profile, queued=all(one.queued for one in found))


def _seconds_in_a_row(step: Callable[[], object], clock: DeviceClock) -> float:
    clock.finish()
    start = now()
    for _ in range(STEPS_AT_ONCE):
        step()
    clock.finish()
    return (now() - start) / STEPS_AT_ONCE


def _summarise(traces: Sequence[StepTrace], splits: Sequence[StepTrace], step: Timing, machine: Machine) -> StepProfile:
    count = len(traces)
    phases = {phase: None for trace in traces for phase in trace.between}
    calls = {call: None for trace in traces for call in trace.calls}
    entries: list[StepEntry] = []
    for call in calls:
        spent = [trace.calls[call] for trace in traces if call in trace.calls]
        entries += _entries(call, spent, count, _shares(call, splits), machine)
    between = {phase: [trace.between[phase] for trace in traces if phase in trace.between] for phase in phases}
    return StepProfile(
        entries=tuple(entries),
        framework_seconds={phase: sum(run.seconds for run in runs) / count for phase, runs in between.items()},
        framework_faults={phase: sum(run.page_faults for run in runs) / count for phase, runs in between.items()},
        instrument_seconds=sum(trace.tracing for trace in traces) / count,
        profiled_seconds=sum(trace.seconds for trace in traces) / count,
        step=step,
        machine=machine,
    )


def _shares(call: Call, splits: Sequence[StepTrace]) -> list[tuple[float, float]]:
    """Share of each pass in time and in page faults of a call that does several; empty if it was never split."""
    parts = [trace.parts[call] for trace in splits if call in trace.parts]
    seconds = [sum(part.seconds for part in pass_) for pass_ in zip(*parts, strict=True)]
    faults = [sum(part.page_faults for part in pass_) for pass_ in zip(*parts, strict=True)]
    return [
        (own / max(sum(seconds), 1e-12), own_faults / max(sum(faults), 1))
        for own, own_faults in zip(seconds, faults, strict=True)
    ]


def _entries(
    call: Call, spent: Sequence[Spent], count: int, shares: list[tuple[float, float]], machine: Machine
) -> list[StepEntry]:
    """One entry per pass where the passes of the operator could be told apart, else one entry."""

    def entry(pass_: str, flops: float, min_bytes: float, share: tuple[float, float], estimated: bool) -> StepEntry:
        return StepEntry(
            layer=call.layer,
            kind=call.kind,
            pass_=pass_,
            op=call.operator,
            seconds=share[0] * sum(run.seconds for run in spent) / count,
            calls=sum(run.calls for run in spent) / count,
            flops=flops / count,
            min_bytes=min_bytes / count,
            page_faults=share[1] * sum(run.page_faults for run in spent) / count,
            least_seconds=machine.least_seconds(flops / count, min_bytes / count),
            backend=call.backend,
            problem=call.problem,
            split_estimated=estimated,
        )

    flops = [sum(run.flops[index] for run in spent) for index in range(len(call.passes))]
    min_bytes = [sum(run.min_bytes[index] for run in spent) for index in range(len(call.passes))]
    if len(call.passes) == 1:
        return [entry(call.passes[0], flops[0], min_bytes[0], (1.0, 1.0), False)]
    if not shares:
        return [entry(call.phase, sum(flops), sum(min_bytes), (1.0, 1.0), False)]
    return [
        entry(pass_, flops[index], min_bytes[index], shares[index], True) for index, pass_ in enumerate(call.passes)
    ]
