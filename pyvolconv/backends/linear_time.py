"""Times that grow with the products of a pass and with the bytes of its tensors: what cost models are put together of.

In FLOPs of float32 at the FMA peak of the processor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..problem import DTYPE_BYTES, ConvProblem


def rounded_up(size: int, lanes: int) -> int:
    """What is computed of `size` values in whole vectors."""
    return -(-size // lanes) * lanes


def used_share(size: int, lanes: int) -> float:
    """Share of lanes in use when `size` values are cut into vectors."""
    return size / rounded_up(size, lanes)


def fewer_lanes(problem: ConvProblem) -> float:
    """How many vectors hold what one holds in float32."""
    return max(1.0, DTYPE_BYTES[problem.dtype] / DTYPE_BYTES["float32"])


class Costs(NamedTuple):
    """Of a FLOP of the products, a byte of the input, of the output and of the weight, and of a call."""

    flop: float
    input: float
    output: float
    weight: float
    call: float


def summed(problem: ConvProblem, cost: Costs, flops: float) -> float:
    """The time of a pass with so many FLOPs in its products, in vain or not."""
    read, written, weight = (
        DTYPE_BYTES[problem.dtype] * math.prod(shape)
        for shape in (problem.input_shape, problem.output_shape, problem.weight_shape)
    )
    return cost.flop * flops + cost.input * read + cost.output * written + cost.weight * weight + cost.call
