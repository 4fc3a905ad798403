"""Where each millisecond of a training step goes, per layer and per pass.

The step runs under a dispatch mode that takes the time of every operator, forward and backward (autograd on CPU runs
backward in the calling thread, inside the mode). Wall time is cut without remainder into
operators + framework (autograd, Python, freeing memory between operators) + the instrument itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn

from .machine import Machine
from .timing import Timing


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
            freeing memory (returning pages to the system happens here).
        framework_faults: page faults there, same keys.
        instrument_seconds: spent by the profiler itself.
        profiled_seconds: wall time of the step while profiled.
        step: the same step timed without the profiler, interleaved with profiled runs.
        machine: the ceilings used for `roofline_share`.
    """

    entries: tuple[StepEntry, ...]
    framework_seconds: dict[str, float]
    framework_faults: dict[str, float]
    instrument_seconds: float
    profiled_seconds: float
    step: Timing
    machine: Machine

    def split(self) -> StepSplit:
        """The step as it runs without the profiler; convolutions' passes as profiled, the rest is `other`."""
        raise NotImplementedError

    def profiled_split(self) -> StepSplit:
        """The step as it ran under the profiler, whose own time counts in `other`."""
        raise NotImplementedError

    def by_layer(self) -> dict[tuple[str, str], float]:
        """Seconds per (layer, pass)."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values for JSON."""
        raise NotImplementedError


def profile_step(
    step: Callable[[], object],
    model: nn.Module,
    *,
    repeats: int = 7,
    warmup: int = 2,
    machine: Machine | None = None,
) -> StepProfile:
    """Takes one training step apart.

    Args:
        step: runs one training step (zero_grad, forward, loss, backward, optimizer); called
            `warmup + 2 * repeats + 2` times, so its weights move on by as many steps.
        model: the module whose layers are to be named.
        repeats: profiled runs, and as many unprofiled ones between them. Entries are the mean over the middle half of
            the profiled runs by wall time (interquartile mean), so that they still sum to the step's time.
        warmup: runs before the first timed one.
        machine: ceilings for the roofline; measured when not given.
    """
    raise NotImplementedError
