"""What share of a GPU's peak torch's own kernels are expected to reach: the cost model of `aten` on CUDA.

Not yet fitted, but what has been published of cuDNN: 0.3 to 0.4 of the peak for a dense convolution of 256 channels in
half precision, for patches of three channels 10 to 50 times what a matrix product takes, depthwise 2.5 to 20 times what
memory needs. `expected_share` takes a problem for one of a few kinds, and `COSTS` has what each pass of a kind costs.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from ..problem import DTYPE_BYTES, ConvProblem, Pass
from .cuda_peak import share_of_peak

Kind = Literal["dense", "one tap", "patches", "few channels", "grouped", "depthwise"]


class Cost(NamedTuple):
    """What a pass costs in torch.

    Attributes:
        reached: share of the peak while no memory is waited for.
        traffic: bytes moved, in times of the least.
        reordered: what is moved besides where the layout is ncdhw, in the same unit: tensors are transposed and back.
    """

    reached: float
    traffic: float = 1.0
    reordered: float = 2.0


COSTS: dict[Kind, dict[Pass, Cost]] = {
    "dense": {"forward": Cost(0.35), "grad_input": Cost(0.3), "grad_weight": Cost(0.25)},
    "one tap": {"forward": Cost(0.5), "grad_input": Cost(0.5), "grad_weight": Cost(0.4)},
    "patches": {"forward": Cost(0.03), "grad_input": Cost(0.03), "grad_weight": Cost(0.03)},
    "few channels": {"forward": Cost(0.15), "grad_input": Cost(0.1), "grad_weight": Cost(0.1)},
    "grouped": {"forward": Cost(0.1), "grad_input": Cost(0.1), "grad_weight": Cost(0.05)},
    "depthwise": {
        "forward": Cost(0.02, traffic=4, reordered=0),
        "grad_input": Cost(0.01, traffic=8, reordered=0),
        "grad_weight": Cost(0.01, traffic=15, reordered=0),
    },
}

FEW_CHANNELS = 16
"""Fewer per side and group do not fill what tensor cores multiply at once."""

CALL_SECONDS = 10e-6
"""What a call takes on the host."""


def expected_share(problem: ConvProblem, pass_: Pass) -> float:
    """Expected FLOPs per second over the peak."""
    cost, least = COSTS[kind_of(problem)][pass_], problem.min_bytes(pass_)
    more = (cost.traffic - 1) * least
    if problem.layout == "ncdhw":
        more += cost.reordered * least
    if problem.bias and pass_ == "forward":
        # Added by a kernel of its own, which reads and writes the result.
        more += 2 * math.prod(problem.output_shape) * DTYPE_BYTES[problem.dtype]
    return share_of_peak(problem, pass_, cost.reached, more, CALL_SECONDS)


def kind_of(problem: ConvProblem) -> Kind:
    """What cuDNN has different kernels for, as far as their speeds tell."""
    if problem.groups > 1:
        return "depthwise" if problem.groups == problem.in_channels else "grouped"
    if problem.kernel_size == (1, 1, 1):
        return "one tap"
    few = min(problem.in_channels, problem.out_channels) < FEW_CHANNELS
    apart = all(
        size == 1 or taps <= stride
        for size, taps, stride in zip(problem.output_size, problem.kernel_size, problem.stride, strict=True)
    )
    if few:
        return "patches" if apart else "few channels"
    return "dense"
