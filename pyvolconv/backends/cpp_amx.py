"""`cpp.amx`: float32 convolution on a processor's matrix unit (AMX), whose operands are bfloat16, from csrc/.

A float32 value is exactly the sum of three bfloat16 ones. Of the nine products of two values' parts the six that matter
are summed in float32, which leaves an error of the order of float32's own; the unit is 16 times as fast as float32
FMAs, so that convolution runs above their peak; Winograd's F(2, 3) along one axis makes three taps two. Where `set_precision("high")` allows more rounding, two parts
and three products do; where `torch.backends.mkldnn.conv.fp32_precision` is "bf16", one (G. Henry, P. Tang, A. Heinecke,
"Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019).

Operands with an infinity, a NaN, or a value that rounds to an infinite bfloat16 have no such parts: those are
computed by `cpp.direct`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..precision import convolves_float32_in_bfloat16, get_precision
from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .cpp import call, kernels, load_extension, plan_of

PRODUCTS = {1: 1, 2: 3, 3: 6}
"""Products of two values' parts that are summed, by the number of parts."""

ROUNDING = {1: 2.0**16, 2: 96.0, 3: 0.0}
"""What a product loses beside the rounding of sums, in steps of float32's eps."""


class CppAmx(Backend):
    """Forward and grad_input of any window, stride and dilation, both layouts; one group."""

    name = "cpp.amx"
    family = "cpp"
    plain = False
    """Compute as the matrix unit would without one, slowly: only for tests."""

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        _, missing = load_extension()
        if missing:
            return [missing]
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"device is {problem.device}; it runs on cpu")
        if problem.dtype != "float32":
            reasons.append(f"dtype is {problem.dtype}; it computes float32")
        if pass_ == "grad_weight":
            reasons.append("it has no grad_weight")
        if problem.groups != 1:
            reasons.append(f"it has {problem.groups} groups; it needs one")
        if problem.pool is not None:
            reasons.append("has no pass fused with a pool")
        if not (self.plain or kernels().has_matrix_unit()):
            reasons.append(f"instruction set {kernels().current_isa()} of this processor has no AMX, or may not use it")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        call(kernels().split_forward, plan_of(problem), x, weight, bias, y, options=(parts(), self.plain))
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        options = (parts(), self.plain)
        call(kernels().split_grad_input, plan_of(problem), grad_output, weight, result, options=options)
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.name} has no grad_weight: {problem}")

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        count = parts()
        reach = tuple(3 * _may_be_transformed(problem, axis) for axis in (0, 1))
        mixed = 2 if any(reach) else 1
        # Each product of parts is added for itself: that many sums in place of one, with half a step of rounding each.
        rounding = mixed * ROUNDING[count] / problem.reduction_length(pass_)
        return Accuracy(
            constant=max(1.0, mixed * PRODUCTS[count] / 2) + rounding,
            accumulate_dtype="float32",
            bitwise_reproducible=True,
            reach=(*reach, 0),
            exact_integers=count == 3,
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """The unit makes products of parts at 10.4 times the rate of FMAs, of which 0.85 is reached."""
        targets, sources = problem.out_channels, problem.in_channels
        size = problem.output_size
        if pass_ == "grad_input":
            targets, sources, size = sources, targets, problem.input_size
        taps = math.prod(problem.kernel_size)
        run = problem.kernel_size[2] * sources
        used = sources * problem.kernel_size[2] / (-(-run // 32) * 32) * targets / (-(-targets // 16) * 16)
        used *= size[2] / (-(-size[2] // 16) * 16)
        products = PRODUCTS[parts()] * taps / used / (10.4 * 0.85)
        return taps / products


def _may_be_transformed(problem: ConvProblem, axis: int) -> bool:
    return problem.kernel_size[axis] == 3 and problem.stride[axis] == problem.dilation[axis] == 1


def parts() -> int:
    """Into how many bfloat16 values the user's settings let a float32 value be split."""
    if convolves_float32_in_bfloat16():
        return 1
    return 2 if get_precision() == "high" else 3
