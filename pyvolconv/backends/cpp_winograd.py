"""`cpp.winograd`: all three passes with fewer multiplications, fused tile by tile in cache, from csrc/.

A scheme F(m_d x m_h x m_w, 3x3x3) computes a tile of m_d * m_h * m_w outputs from (m_d + 2)(m_h + 2)(m_w + 2) products
per pair of channels where direct convolution takes 27 m_d m_h m_w: 8 for 27 with F(2x2x2), 6 for 27 with F(2x2x4), 3.4
for 27 with F(4x4x4) (A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2016; csrc/algorithm/
winograd_axis.h has the transforms). Transforms and ragged edges take some of that back; `scheme` weighs it up.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..precision import Precision, get_precision
from ..problem import DTYPE_BYTES, ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .cpp import DTYPES, follow_torch_threads, kernels, load_extension, plan_of, pooled_plan_of

Outputs = tuple[int, int, int]

SCHEMES: dict[tuple[int, int, int], dict[Precision, tuple[Outputs, ...]]] = {
    (3, 3, 3): {
        "default": ((2, 2, 2), (2, 2, 4), (2, 4, 2)),
        "high": ((2, 2, 2), (2, 2, 4), (2, 4, 2), (2, 4, 4), (4, 4, 4)),
    },
    (1, 3, 3): {"default": ((1, 2, 2), (1, 2, 4)), "high": ((1, 2, 2), (1, 2, 4), (1, 4, 4))},
    (3, 1, 1): {"default": ((2, 1, 1), (4, 1, 1)), "high": ((2, 1, 1), (4, 1, 1))},
}
"""Outputs of a tile per axis, by kernel size and by what `set_precision` allows; for grad_weight those without a 4."""


class CppWinograd(Backend):
    """Winograd convolution of 3x3x3, 1x3x3 and 3x1x1 kernels with stride 1; forward also fused with a max-pool."""

    name = "cpp.winograd"
    family = "cpp"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"device is {problem.device}; it runs on cpu")
        if problem.dtype not in DTYPES:
            reasons.append(f"dtype is {problem.dtype}; it computes {' and '.join(DTYPES)}")
        if pass_ != "forward" and problem.pool is not None:
            reasons.append(f"it has no {pass_} fused with a pool")
        if problem.kernel_size not in SCHEMES:
            reasons.append(f"kernel size is {problem.kernel_size}; it computes {', '.join(map(str, SCHEMES))}")
        if problem.stride != (1, 1, 1) or problem.dilation != (1, 1, 1):
            reasons.append(f"stride is {problem.stride} and dilation {problem.dilation}; it needs 1")
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
        follow_torch_threads()
        kernels().winograd_forward(
            plan_of(problem),
            self._outputs(problem, "forward"),
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
        )
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        follow_torch_threads()
        kernels().winograd_grad_input(
            plan_of(problem),
            self._outputs(problem, "grad_input"),
            grad_output.data_ptr(),
            weight.data_ptr(),
            result.data_ptr(),
        )
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", x)
        follow_torch_threads()
        kernels().winograd_grad_weight(
            plan_of(problem),
            self._outputs(problem, "grad_weight"),
            grad_output.data_ptr(),
            x.data_ptr(),
            result.data_ptr(),
        )
        return result

    def forward_max_pool(
        self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        code = empty(problem, "code", x)
        return self._max_pool(problem, x, weight, bias, code.data_ptr()), code

    def max_pool(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._max_pool(problem, x, weight, bias, 0)

    def _max_pool(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None, code: int) -> Tensor:
        pooled = empty(problem, "pooled", x)
        follow_torch_threads()
        kernels().winograd_forward_max_pool(
            pooled_plan_of(problem),
            self._outputs(problem, "forward"),
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            pooled.data_ptr(),
            code,
        )
        return pooled

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """F(2) alone keeps integers exact; each axis of F(4) in a scheme beyond the first multiplies the error."""
        depth, height, width = outputs = self._outputs(problem, pass_)
        fours = outputs.count(4)
        return Accuracy(
            constant=2.0 if fours < 2 else 2.0 * 4 ** (fours - 1),
            accumulate_dtype=problem.dtype,
            bitwise_reproducible=True,
            reach=(_reach(depth), _reach(height), _reach(width)),
            exact_integers=fours == 0,
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        return _best(problem, pass_, get_precision(), _vector_bytes()).efficiency

    @staticmethod
    def _outputs(problem: ConvProblem, pass_: Pass) -> Outputs:
        return _best(problem, pass_, get_precision(), _vector_bytes()).outputs


def _reach(outputs: int) -> int:
    """How far the voxels lie that a tile of three taps per axis mixes into one output."""
    return 0 if outputs == 1 else outputs + 1


class _Choice(NamedTuple):
    efficiency: float
    outputs: Outputs


def _vector_bytes() -> int:
    return {"avx512": 64, "avx2": 32}.get(kernels().current_isa(), 16)


def _fitting(problem: ConvProblem, pass_: Pass, precision: Precision) -> list[Outputs]:
    """Schemes for the kernel and the pass into whose tiles the windows of the pool fit."""
    schemes = SCHEMES[problem.kernel_size][precision]
    if pass_ == "grad_weight":
        return [outputs for outputs in schemes if 4 not in outputs]
    pool = problem.pool
    if pool is None:
        return list(schemes)
    if pool.stride != pool.window or pool.padding != (0, 0, 0):
        return []
    return [outputs for outputs in schemes if all(m % w == 0 for m, w in zip(outputs, pool.window, strict=True))]


def _used(size: int, lanes: int) -> float:
    """Share in use of what computes `lanes` values at once."""
    return size / (-(-size // lanes) * lanes)


@lru_cache(maxsize=4096)
def _best(problem: ConvProblem, pass_: Pass, precision: Precision, vector_bytes: int) -> _Choice:
    """The scheme with the least expected time.

    In units of one FMA of one pair of channels at peak, with numbers fitted to measurements (docs/performance.md): the
    products run at 0.82 of peak; loading, transforming and storing an output voxel takes as long as 3.6 (ncdhw: 5.2) of
    its direct products for each channel, averaged harmonically; transforming a weight takes 8 per point; and weights
    that exceed the caches are read again for every box of tiles. grad_weight transforms two tensors, each once for
    every block of channels of the other, and transforms its sums back, which wait in memory for those of other splits
    of the tiles unless there are many blocks.
    """
    lanes = vector_bytes // DTYPE_BYTES[problem.dtype]
    channels = (problem.in_channels, problem.out_channels)
    targets = channels[0] if pass_ == "grad_input" else channels[1]
    half = lanes // 2 if vector_bytes == 64 and pass_ != "grad_weight" else lanes
    used = _used(targets, half)
    if pass_ == "grad_weight":
        used *= _used(channels[0], lanes // 2)  # rows of a register tile
    size: tuple[int, ...] = problem.input_size if pass_ == "grad_input" else problem.output_size
    if problem.pool is not None:
        size = tuple(count * window for count, window in zip(problem.pooled_size, problem.pool.window, strict=True))
    taps = math.prod(problem.kernel_size)
    each = {"ndhwc": 3.6, "ncdhw": 5.2}[problem.layout]
    moving = each * (1 / channels[0] + 1 / channels[1]) / 2
    finishing = 8.0
    if pass_ == "grad_weight":
        bytes_ = DTYPE_BYTES[problem.dtype]
        source_blocks, target_blocks = -(-channels[0] * bytes_ // 256), -(-channels[1] * bytes_ // 512)
        moving = each * (target_blocks / channels[1] + source_blocks / channels[0])
        finishing = 128.0 if source_blocks * target_blocks < 16 else 64.0
    best = _Choice(0.0, (0, 0, 0))
    for outputs in _fitting(problem, pass_, precision):
        points = math.prod(m + k - 1 for m, k in zip(outputs, problem.kernel_size, strict=True))
        tiles = problem.batch * math.prod(-(-count // m) for count, m in zip(size, outputs, strict=True))
        weight_bytes = points * math.prod(channels) * DTYPE_BYTES[problem.dtype]
        spilling = 1.7 if weight_bytes > 16 << 20 and pass_ != "grad_weight" else 1.0
        products = tiles * points * spilling / (0.82 * used)
        transforms = taps * moving * tiles * math.prod(outputs) + finishing * points
        efficiency = taps * problem.batch * math.prod(size) / (products + transforms)
        best = max(best, _Choice(efficiency, outputs))
    return best
