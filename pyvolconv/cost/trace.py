"""The time of every operator that runs inside a step, by a dispatch mode.

Wall time is cut without remainder into operators, what happens between them (autograd, Python, memory being freed), and
the tracing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..dispatch import choose, choose_or_none
from ..problem import Pass
from .assignment import Assigner, Assignment
from .attribution import Attribution, Phase
from .pages import page_faults
from .timing import now
from .work import Work

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_OUTPUT_MASK = 10  # its last argument: which of grad_input, grad_weight and the bias gradient to compute


@dataclass(frozen=True)
class Call:
    """What tells operator calls of a step apart.

    Attributes:
        layer, phase, kind, operator: see `assignment.Assignment`.
        passes: that the operator does at once, in order.
        problem: `str(ConvProblem)` of a convolution, None otherwise.
        backend: that ran it; "aten" etc. for operators of other libraries.
    """

    layer: str
    phase: Phase
    kind: str
    operator: str
    passes: tuple[str, ...]
    problem: str | None
    backend: str


@dataclass
class Spent:
    """Time, page faults and counted work, summed over calls; work per pass in the order of `Call.passes`."""

    seconds: float = 0.0
    page_faults: int = 0
    calls: int = 0
    flops: tuple[int, ...] = ()
    min_bytes: tuple[int, ...] = ()

    def add(self, seconds: float, page_faults: int, flops: Sequence[int] = (), min_bytes: Sequence[int] = ()) -> None:
        """One more call."""
        self.seconds += seconds
        self.page_faults += page_faults
        self.calls += 1
        self.flops = _added(self.flops, flops)
        self.min_bytes = _added(self.min_bytes, min_bytes)

    def add_work(self, seconds: float, works: Sequence[tuple[str, Work]], page_faults: int = 0) -> None:
        """One more call, with the work that was assigned to its passes."""
        self.add(seconds, page_faults, [work.flops for _, work in works], [work.min_bytes for _, work in works])


@dataclass
class StepTrace:
    """One traced step.

    Attributes:
        seconds: wall time: the sum of all that follows.
        calls: in operators.
        between: between operators, by the phase of the operator before.
        tracing: seconds of the tracing itself.
        parts: of calls that did several passes and were run once for each: the passes, in the order of
            `Call.passes`. Filled by `split` only.
    """

    seconds: float = 0.0
    calls: dict[Call, Spent] = field(default_factory=dict)
    between: dict[Phase, Spent] = field(default_factory=dict)
    tracing: float = 0.0
    parts: dict[Call, tuple[Spent, ...]] = field(default_factory=dict)


def trace_step(step: Callable[[], object], model: nn.Module, split: bool = False) -> StepTrace:
    """Run one step and take the time of every operator.

    Args:
        step: one training step of `model`.
        model: whose layers are told apart.
        split: run each aten.convolution_backward once for grad_input and once for grad_weight (with the bias
            gradient), to learn how its time divides; the results are the same.
    """
    with Attribution(model) as attribution:
        tracer = _Tracer(attribution, split)
        start = tracer.begin()
        with tracer:
            step()
        return tracer.end(start)


class _Tracer(TorchDispatchMode):
    def __init__(self, attribution: Attribution, split: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._assigner = Assigner(attribution)
        self._split = split
        self._trace = StepTrace()
        self._phase: Phase = "other"

    def begin(self) -> float:
        self._faults_left = page_faults()
        self._left = now()
        return self._left

    def end(self, start: float) -> StepTrace:
        end = now()
        self._between(end)
        self._trace.seconds = end - start
        return self._trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        entered = now()
        self._between(entered)
        faults, start = page_faults(), now()
        parts: tuple[Spent, ...] = ()
        if self._split and does_both_gradients(func, args):
            timed: list[Spent] = []
            result = convolution_backward_in_parts(args, lambda part: _timed(part, timed))
            parts = tuple(timed)
        else:
            result = func(*args, **(kwargs or {}))
        end, faults = now(), page_faults() - faults
        self._record(self._assigner.assign(func, args, result), end - start, faults, parts)
        self._faults_left = page_faults()
        self._left = now()
        self._trace.tracing += (start - entered) + (self._left - end)
        return result

    def _between(self, until: float) -> None:
        spent = self._trace.between.setdefault(self._phase, Spent())
        spent.add(until - self._left, page_faults() - self._faults_left)

    def _record(self, assigned: Assignment, seconds: float, faults: int, parts: tuple[Spent, ...]) -> None:
        call = call_of(assigned)
        self._trace.calls.setdefault(call, Spent()).add_work(seconds, assigned.works, faults)
        if parts:
            sums = self._trace.parts.setdefault(call, tuple(Spent() for _ in parts))
            for total, part in zip(sums, parts, strict=True):
                total.add(part.seconds, part.page_faults)
        self._phase = assigned.phase


def call_of(assigned: Assignment) -> Call:
    """What an operator call belongs to, and which backend ran it; to be asked where the call was made."""
    problem = assigned.works[0][1].problem
    backend = assigned.operator.partition(".")[0]
    if backend == "pyvolconv" and problem is not None:
        pass_ = cast("Pass", assigned.works[0][0])
        # Without a fused pass the operator runs the plain one, and torch's pooling.
        backend = (choose_or_none(problem, pass_) or choose(problem.without_epilogue(), pass_)).name
    return Call(
        assigned.layer,
        assigned.phase,
        assigned.kind,
        assigned.operator,
        tuple(pass_ for pass_, _ in assigned.works),
        None if problem is None else str(problem),
        backend,
    )


def does_both_gradients(operator: Any, args: Sequence[Any]) -> bool:
    """Whether a call is aten.convolution_backward for grad_input and, at once, gradients of weight or bias."""
    return operator is _CONVOLUTION_BACKWARD and args[_OUTPUT_MASK][0] and any(args[_OUTPUT_MASK][1:])


def convolution_backward_in_parts(args: Sequence[Any], timed: Callable[[Callable[[], Any]], Any]) -> Any:
    """The results of such a call, by one for grad_input and one for the rest, each handed to `timed` to be run."""
    needs_input, needs_weight, needs_bias = args[_OUTPUT_MASK]
    grads = [
        timed(partial(_CONVOLUTION_BACKWARD, *args[:_OUTPUT_MASK], mask))
        for mask in ([needs_input, False, False], [False, needs_weight, needs_bias])
    ]
    return (grads[0][0], *grads[1][1:])


def _timed(part: Callable[[], Any], parts: list[Spent]) -> Any:
    faults, start = page_faults(), now()
    result = part()
    parts.append(Spent(now() - start, page_faults() - faults, 1))
    return result


def _added(sums: Sequence[int], more: Sequence[int]) -> tuple[int, ...]:
    return tuple(first + second for first, second in zip(sums, more, strict=True)) if sums else tuple(more)
