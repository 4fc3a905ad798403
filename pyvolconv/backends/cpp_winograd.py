"""`cpp.winograd`: all three passes with fewer multiplications, fused tile by tile in cache, from csrc/.

A scheme F(m_d x m_h x m_w, 3x3x3) computes a tile of m_d * m_h * m_w outputs from (m_d + 2)(m_h + 2)(m_w + 2) products
per pair of channels where direct convolution takes 27 m_d m_h m_w: 8 for 27 with F(2x2x2), 6 for 27 with F(2x2x4) or
F(2x4x2), 3.4 for 27 with F(4x4x4) (A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2016;
csrc/algorithm/winograd_axis.h has the transforms). With stride 2 an axis takes 5 products for 6
(winograd_strided_axis.h). Transforms and ragged edges take some of that back; `cpp_winograd_time` weighs it up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..precision import Precision, get_precision
from ..problem import ConvProblem, Pass
from .base import Accuracy, empty
from .cpp import (
    DTYPES,
    PooledForward,
    arithmetic_is_cheap,
    call,
    host_reasons,
    kernels,
    load_extension,
    mixed_plan_of,
    plan_of,
    pooled_plan_of,
)
from .cpp_winograd_time import Outputs, expected_time

SCHEMES: dict[tuple[int, int, int], dict[Precision, tuple[Outputs, ...]]] = {
    (3, 3, 3): {
        "default": ((2, 2, 2), (2, 2, 4), (2, 4, 2)),
        "high": ((2, 2, 2), (2, 2, 4), (2, 4, 2), (2, 4, 4), (4, 4, 4)),
    },
    (1, 3, 3): {"default": ((1, 2, 2), (1, 2, 4)), "high": ((1, 2, 2), (1, 2, 4), (1, 4, 4))},
    (3, 1, 1): {"default": ((2, 1, 1), (4, 1, 1)), "high": ((2, 1, 1), (4, 1, 1))},
}
"""Outputs of a tile per axis, by kernel size and by what `set_precision` allows; for grad_weight those without a 4."""

STRIDED_SCHEMES: dict[tuple[tuple[int, int, int], tuple[int, int, int]], Outputs] = {
    ((3, 3, 3), (2, 2, 2)): (2, 2, 2),
    ((3, 3, 3), (1, 2, 2)): (2, 2, 2),
    ((1, 3, 3), (1, 2, 2)): (1, 2, 2),
}
"""The same by kernel size and stride; a tile of grad_input has `stride` times as many outputs."""


class CppWinograd(PooledForward):
    """Winograd convolution of 3x3x3, 1x3x3 and 3x1x1 kernels with stride 1, also dilated, and of some with stride 2.

    Without dilation, forward is also fused with a max-pool.
    """

    name = "cpp.winograd"
    family = "cpp"
    mixes_layouts = ("weight",)  # of a contiguous x long rows take up to half as long again, more than a copy

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = host_reasons(problem, DTYPES)
        if pass_ != "forward" and problem.pool is not None:
            reasons.append(f"it has no {pass_} fused with a pool")
        if problem.kernel_size not in SCHEMES:
            reasons.append(f"kernel size is {problem.kernel_size}; it computes {', '.join(map(str, SCHEMES))}")
        elif problem.stride != (1, 1, 1):
            strides = [stride for kernel, stride in STRIDED_SCHEMES if kernel == problem.kernel_size]
            if problem.stride not in strides:
                reasons.append(f"stride is {problem.stride}; it computes {', '.join(map(str, [(1, 1, 1), *strides]))}")
            elif pass_ == "grad_input" and not _has_strided_grad_input(problem):
                reasons.append("for grad_input axes of stride 2 need dilation 1 and an odd padding at their begin")
        if problem.pool is not None and problem.dilation != (1, 1, 1):
            reasons.append(f"dilation is {problem.dilation}; before a pool it needs 1")
        if problem.groups != 1:
            reasons.append(f"groups is {problem.groups}; it needs 1")
        if not reasons and not _fitting(problem, pass_, get_precision()):
            reasons.append("a pool's windows must touch, have no padding and divide its tiles")
        _, missing = load_extension()
        if missing:
            reasons.append(missing)
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        outputs = self._outputs(problem, "forward")
        call(kernels().winograd_forward, mixed_plan_of(problem, x, weight), x, weight, bias, y, options=(outputs,))
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        outputs = self._outputs(problem, "grad_input")
        call(kernels().winograd_grad_input, plan_of(problem), grad_output, weight, result, options=(outputs,))
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", x)
        outputs = self._outputs(problem, "grad_weight")
        call(kernels().winograd_grad_weight, plan_of(problem), grad_output, x, result, options=(outputs,))
        return result

    def _max_pool(self, problem: ConvProblem, *tensors: Tensor | None) -> None:
        outputs = self._outputs(problem, "forward")
        call(kernels().winograd_forward_max_pool, pooled_plan_of(problem), *tensors, options=(outputs,))

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """F(2) alone keeps integers exact; each axis of F(4) in a scheme beyond the first multiplies the error."""
        outputs = self._outputs(problem, pass_)
        dilation = (1, 1, 1) if pass_ == "grad_weight" else problem.dilation  # taps lie next to each other
        depth, height, width = map(_reach, outputs, problem.stride, dilation)
        fours = sum(m == 4 and s == 1 for m, s in zip(outputs, problem.stride, strict=True))
        return Accuracy(
            constant=2.0 if fours < 2 else 2.0 * 4 ** (fours - 1),
            accumulate_dtype=problem.dtype,
            bitwise_reproducible=True,
            reach=(depth, height, width),
            exact_integers=fours == 0,
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        return _best(problem, pass_, get_precision(), _vector_bytes(), arithmetic_is_cheap()).efficiency

    @staticmethod
    def _outputs(problem: ConvProblem, pass_: Pass) -> Outputs:
        return _best(problem, pass_, get_precision(), _vector_bytes(), arithmetic_is_cheap()).outputs


def _reach(outputs: int, stride: int, dilation: int) -> int:
    """How far the voxels (of a weight's gradient, the taps) lie that a tile of three taps mixes into one result."""
    return 0 if outputs == 1 else (outputs + 1 if stride == 1 else 2) * dilation


class _Choice(NamedTuple):
    efficiency: float
    outputs: Outputs


def _vector_bytes() -> int:
    return {"avx512": 64, "avx2": 32}.get(kernels().current_isa(), 16)


def _has_strided_grad_input(problem: ConvProblem) -> bool:
    axes = zip(problem.stride, problem.dilation, problem.padding, strict=True)
    return all(stride == 1 or (dilation == 1 and begin % 2 == 1) for stride, dilation, (begin, _) in axes)


def _schemes(problem: ConvProblem, pass_: Pass, precision: Precision) -> tuple[Outputs, ...]:
    if problem.stride == (1, 1, 1):
        return SCHEMES[problem.kernel_size][precision]
    depth, height, width = STRIDED_SCHEMES[problem.kernel_size, problem.stride]
    if pass_ == "grad_input":
        depth, height, width = depth * problem.stride[0], height * problem.stride[1], width * problem.stride[2]
    return ((depth, height, width),)


def _fitting(problem: ConvProblem, pass_: Pass, precision: Precision) -> list[Outputs]:
    """Schemes for the kernel and the pass into whose tiles the windows of the pool fit."""
    schemes = _schemes(problem, pass_, precision)
    if pass_ == "grad_weight":
        return [outputs for outputs in schemes if 4 not in outputs]
    pool = problem.pool
    if pool is None:
        return list(schemes)
    if pool.stride != pool.window or pool.padding != (0, 0, 0):
        return []
    return [outputs for outputs in schemes if all(m % w == 0 for m, w in zip(outputs, pool.window, strict=True))]


@lru_cache(maxsize=4096)
def _best(problem: ConvProblem, pass_: Pass, precision: Precision, vector_bytes: int, cheap: bool) -> _Choice:
    """The scheme with the least expected time."""
    direct = problem.flops(pass_) / 2
    best = _Choice(0.0, (0, 0, 0))
    for outputs in _fitting(problem, pass_, precision):
        time = expected_time(problem, pass_, outputs, vector_bytes, cheap)
        best = max(best, _Choice(direct / time, outputs))
    return best
