"""`cpp.first_layer`: the passes for few input channels, from csrc/.

A network's first layer has one to four input channels. The minimal filtering algorithm F(2x2x2) (see cpp_winograd.py)
then has no matrix products to speak of: its 64 products per channel and tile are summed by the transform itself. Here
both happen in registers, and behind a ReLU the 2x2x2 max-pool too: the outputs of a tile are a window. The weight
gradient sums the 64 products over all tiles and transforms the sums.

In the input gradient the few channels would be lanes of vectors. There lanes are voxels of a row of the output's
gradient, and taps along the width times input channels are what a vector is multiplied with.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..problem import DTYPE_BYTES, ConvProblem, Layout, Pass
from .base import Accuracy, empty
from .cpp import (
    DTYPES,
    PooledForward,
    arithmetic_is_cheap,
    call,
    host_reasons,
    kernels,
    load_extension,
    plan_of,
    pooled_plan_of,
)
from .linear_time import fewer_lanes, used_share

MOST_CHANNELS = 4


class CppFirstLayer(PooledForward):
    """At most four input channels: forward, alone or fused with a 2x2x2 max-pool, and grad_weight of 3x3x3 kernels with
    stride 1; grad_input of all."""

    name = "cpp.first_layer"
    family = "cpp"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = host_reasons(problem, DTYPES)
        if problem.in_channels > MOST_CHANNELS or problem.groups != 1:
            reasons.append(
                f"input channels are {problem.in_channels} in {problem.groups} groups; "
                f"it needs at most {MOST_CHANNELS} in one"
            )
        if pass_ != "grad_input" and problem.kernel_size != (3, 3, 3):
            reasons.append(f"kernel size is {problem.kernel_size}; it computes (3, 3, 3)")
        if pass_ != "grad_input" and (problem.stride != (1, 1, 1) or problem.dilation != (1, 1, 1)):
            reasons.append(f"stride is {problem.stride} and dilation {problem.dilation}; it needs 1")
        pool = problem.pool
        if pool is not None and pass_ != "forward":
            reasons.append(f"it has no {pass_} fused with a pool")
        elif pool is not None and (pool.window, pool.stride, pool.padding) != ((2, 2, 2), (2, 2, 2), (0, 0, 0)):
            reasons.append(f"pool is {pool}; it computes windows of 2 with stride 2 and no padding")
        _, missing = load_extension()
        if missing:
            reasons.append(missing)
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        call(kernels().first_layer_forward, plan_of(problem), x, weight, bias, y)
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        call(kernels().first_layer_grad_input, plan_of(problem), grad_output, weight, result)
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", x)
        call(kernels().first_layer_grad_weight, plan_of(problem), grad_output, x, result)
        return result

    def _max_pool(self, problem: ConvProblem, *tensors: Tensor | None) -> None:
        call(kernels().first_layer_forward_max_pool, pooled_plan_of(problem), *tensors)

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """The constants of F(2, 3) are powers of two: small integers stay exact."""
        if pass_ == "grad_input":
            return Accuracy(constant=1.0, accumulate_dtype=problem.dtype, bitwise_reproducible=True)
        return Accuracy(constant=2.0, accumulate_dtype=problem.dtype, bitwise_reproducible=True, reach=(3, 3, 3))

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Direct FLOPs over the time of one tile of outputs and one vector of output channels, in FMAs at peak.

        Fitted to measurements (docs/performance.md): a constant, larger where all outputs are stored, unless they go
        past the caches, and a share of each input channel; 15 more for its transform, which fills whole vectors of
        tiles along the width and serves all output channels; in ncdhw results, or the gradients, are transposed.
        """
        wide = kernels().current_isa() == "avx512"
        lanes = {"avx512": 64, "avx2": 32}.get(kernels().current_isa(), 16) // DTYPE_BYTES[problem.dtype]
        if pass_ == "grad_input":
            return _grad_input_efficiency(problem, lanes)
        size = problem.output_size if problem.pool is None else problem.pooled_size
        depth, height, width = (-(-count // 2) for count in size) if problem.pool is None else size
        vectors = -(-problem.out_channels // lanes)
        kind = "grad_weight" if pass_ == "grad_weight" else "stored" if problem.pool is None else "pooled"
        if kind == "stored" and wide and problem.layout == "ndhwc" and problem.out_channels % lanes == 0:
            stored = problem.batch * math.prod(problem.output_size) * problem.out_channels * DTYPE_BYTES[problem.dtype]
            kind = "streamed" if stored >= STREAMED_BYTES else kind
        start, channel = _TIMES[wide, kind]
        transform = 15 * -(-width // lanes) * lanes / width / vectors
        time = (start + problem.in_channels * (channel + transform)) * fewer_lanes(problem)
        if problem.layout == "ncdhw":
            time *= {"stored": 1.1, "pooled": 1.15, "grad_weight": 1.75}[kind]
        if arithmetic_is_cheap() and kind != "pooled":
            time *= _MOVED[problem.layout, pass_]
        products = problem.flops(pass_) / 2
        return products / (problem.batch * depth * height * width * vectors * lanes * time + CALL)


def _grad_input_efficiency(problem: ConvProblem, lanes: int) -> float:
    """0.67 of peak with rows of whole vectors, and the time of 48 FLOPs for each byte (of 20 where arithmetic is not as
    cheap): rows are read from memory and transposed, sums of taps are added along them."""
    used = used_share(problem.output_size[2], lanes) * DTYPE_BYTES["float32"] / DTYPE_BYTES[problem.dtype]
    apart = 1 if problem.stride[2] == 1 or arithmetic_is_cheap() else 2  # sums are added one by one
    values = math.prod(problem.output_shape) + apart * math.prod(problem.input_shape) * problem.kernel_size[2]
    moved = values * DTYPE_BYTES[problem.dtype] / problem.flops("grad_input")
    called = 2 * CALL / problem.flops("grad_input")
    return 1 / (1.5 / used + called + (48 if arithmetic_is_cheap() else 20) * moved)


CALL = 2e6
"""FMAs in the time of a call: weights are transformed and slabs laid out before the first product."""

STREAMED_BYTES = 32 << 20
"""Outputs of this size are written past the caches."""

_TIMES = {
    (True, "pooled"): (10, 132),
    (True, "stored"): (260, 135),
    (True, "streamed"): (100, 110),
    (True, "grad_weight"): (180, 90),
    (False, "pooled"): (20, 205),
    (False, "stored"): (430, 110),
    (False, "grad_weight"): (230, 110),
}
"""Of a tile and of each input channel, by whether vectors have 64 bytes and by what becomes of the products."""

_MOVED: dict[tuple[Layout, Pass], float] = {
    ("ndhwc", "forward"): 1.6,
    ("ncdhw", "forward"): 2.2,
    ("ndhwc", "grad_weight"): 1.8,
    ("ncdhw", "grad_weight"): 1.35,
}
"""How many times as long it takes where arithmetic is cheap, so that stores and reads are most of the work."""
