"""`cpp.amx`: convolution on a processor's matrix unit (AMX), whose operands are bfloat16, from csrc/.

A float32 value is exactly the sum of three bfloat16 ones. Of the nine products of two values' parts the six that matter
are summed in float32, which leaves an error of the order of float32's own; the unit is 16 times as fast as float32
FMAs, so that convolution runs above their peak; Winograd's F(2, 3) along one axis makes three taps two. Where
`set_precision("high")` allows more rounding, two parts and three products do; where
`torch.backends.mkldnn.conv.fp32_precision` is "bf16", one (G. Henry, P. Tang, A. Heinecke, "Leveraging the bfloat16
Artificial Intelligence Datatype For Higher-Precision Computations", 2019).

A float16 value is exactly the sum of two bfloat16 ones; what three products leave out of the product of two values is
below 2**-17 of it, a 64th of what rounding a result to float16 takes. Where taps are transformed, a result may lose as
much of the values beside its window's own, as by Winograd (`Accuracy.reach`): beside values a million times as large
nothing of it is left. A bfloat16 value is one, and is not transformed. Tensors are read and
written in their own dtype; sums are float32.

Operands with an infinity, a NaN, or a value that rounds to an infinite bfloat16 have no such parts: those are
computed by `cpp.direct`, of 16-bit dtypes by `cpp.widened`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import convolves_float32_in_bfloat16, get_precision
from ..problem import ConvProblem, Pass
from .base import MEMORY_FORMAT, Accuracy, Backend, empty
from .cpp import CppDirect, call, host_reasons, kernels, load_extension, mixed_plan_of, plan_of
from .cpp_amx_time import PRODUCTS, STEP, gather_time, grad_weight_time
from .cpp_widened import CppWidened

PARTS = {"bfloat16": 1, "float16": 2}
"""How many bfloat16 values make up one of a 16-bit dtype."""

ROUNDING = {1: 2.0**16, 2: 2.0**8, 3: 0.0}
"""What a product of float32 values loses beside the rounding of sums, in steps of float32's eps."""

FEWEST_TRANSFORMED = 640
"""Voxels; with fewer, transforming weights takes longer than what it saves."""


class CppAmx(Backend):
    """Any window, stride and dilation, both layouts; one group."""

    name = "cpp.amx"
    family = "cpp"
    mixes_layouts = ("x", "weight")
    plain = False
    """Compute as the matrix unit would without one, slowly: only for tests."""

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        _, missing = load_extension()
        if missing:
            return [missing]
        reasons = host_reasons(problem, ("float32", *PARTS))
        if problem.groups != 1:
            reasons.append(f"it has {problem.groups} groups; it needs one")
        if problem.pool is not None:
            reasons.append("has no pass fused with a pool")
        if not (self.plain or kernels().has_matrix_unit()):
            reasons.append(f"instruction set {kernels().current_isa()} of this processor has no AMX, or may not use it")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        plan = mixed_plan_of(problem, x, weight)
        if call(kernels().split_forward, plan, x, weight, bias, y, options=self._options(problem)):
            return y
        x, weight = (operand.contiguous(memory_format=MEMORY_FORMAT[problem.layout]) for operand in (x, weight))
        return _other(problem).forward(problem, x, weight, bias)

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        return self.transposed(problem, grad_output, weight, None)

    def transposed(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = empty(problem, "input", x)
        # Elsewhere than in float32 the bias is added to what was rounded before.
        inside = bias if problem.dtype == "float32" else None
        operands, options = (x, weight, inside, result), self._options(problem)
        splits, added = call(kernels().split_grad_input, plan_of(problem), *operands, options=options)
        if not splits:
            return _other(problem).transposed(problem, x, weight, bias)
        return result if bias is None or (added and inside is not None) else result.add_(bias.view(-1, 1, 1, 1))

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", x)
        options = self._options(problem)
        if call(kernels().split_grad_weight, plan_of(problem), grad_output, x, result, options=options):
            return result
        return _other(problem).grad_weight(problem, grad_output, x)

    def _options(self, problem: ConvProblem) -> tuple[object, ...]:
        return problem.dtype, parts(problem), self.plain

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        count = parts(problem)
        length = problem.reduction_length(pass_)
        sources = problem.in_channels if pass_ == "forward" else problem.out_channels
        depth, height = (_mixed_voxels(problem, pass_, axis) for axis in (0, 1))
        mixed = 2 if depth or height else 1
        # The unit sums up to 32 products of the taps of a run and adds that sum to what was there: half a step of
        # rounding for each addition, as in a plain sum, and what parts leave out.
        run = sources * _taps_of_a_run(problem, pass_)
        additions = PRODUCTS[count] * (length // run) * -(-run // STEP) + min(length, 17)
        rounding = 0.0 if problem.dtype == "bfloat16" else mixed * ROUNDING[count]
        # What float16 loses in a product is little beside its own eps, whatever the number of products.
        unit = "float16" if problem.dtype == "float16" else "float32"
        steps = torch.finfo(torch.float32).eps / torch.finfo(getattr(torch, unit)).eps
        return Accuracy(
            constant=steps * max(float(mixed), (additions / 2 + 0.5 + rounding) / length),
            accumulate_dtype=unit,
            bitwise_reproducible=True,
            reach=(depth, height, 0),
            exact_integers=count == 3 or problem.dtype == "bfloat16",
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        if pass_ == "grad_weight":
            time = grad_weight_time(problem, parts(problem))
        else:
            axes = [axis for axis in (0, 1) if _may_be_transformed(problem, pass_, axis)]
            time = gather_time(problem, pass_, parts(problem), axes)
        return problem.flops(pass_) / 2 / time


def _may_be_transformed(problem: ConvProblem, pass_: Pass, axis: int) -> bool:
    if pass_ == "grad_weight" or math.prod(problem.kernel_size) < 27 or parts(problem) == 1:
        return False
    size = problem.input_size if pass_ == "grad_input" else problem.output_size
    if problem.batch * math.prod(size) < FEWEST_TRANSFORMED:
        return False
    return problem.kernel_size[axis] == 3 and problem.stride[axis] == problem.dilation[axis] == 1


def _taps_of_a_run(problem: ConvProblem, pass_: Pass) -> int:
    """How many taps along the width the products of a step may come from, at the least."""
    kernel, stride, dilation = problem.kernel_size[2], problem.stride[2], problem.dilation[2]
    if pass_ == "forward":
        return kernel if dilation == 1 and stride <= kernel else 1
    if pass_ == "grad_input":
        return -(-kernel * dilation // stride) if stride % dilation == 0 else 1
    return 1


def _mixed_voxels(problem: ConvProblem, pass_: Pass, axis: int) -> int:
    """How far apart along an axis voxels may be that a transform mixes; 0 where there is none.

    An input voxel's gradient has those of every `period`-th tap, and where three of these are neighbours in grad_output
    (csrc/algorithm/split_plan.h) the tile has voxels that are a stride apart, of kernels longer than three taps too.
    """
    kernel, stride, dilation = problem.kernel_size[axis], problem.stride[axis], problem.dilation[axis]
    if parts(problem) == 1:
        return 0
    if pass_ != "grad_input":
        return 3 * _may_be_transformed(problem, pass_, axis)
    if stride % dilation != 0:
        return 0
    period = stride // dilation
    return 3 * stride if 3 in (kernel // period, -(-kernel // period)) else 0


def parts(problem: ConvProblem) -> int:
    """Into how many bfloat16 values a value is split: of float32 what the user's settings let.

    Example:
        >>> parts(ConvProblem.parse("cpu-float16-ncdhw-n1ic2oc3-i4-k3"))
        2
    """
    if problem.dtype in PARTS:
        return PARTS[problem.dtype]
    if convolves_float32_in_bfloat16():
        return 1
    return 2 if get_precision() == "high" else 3


def _other(problem: ConvProblem) -> Backend:
    """Who computes where an operand has no parts."""
    return CppDirect() if problem.dtype == "float32" else CppWidened()
