"""How long `cpp.winograd` is expected to take with a scheme, in FMAs at peak: its cost model.

The numbers are fitted to measurements (docs/performance.md) on two kinds of processor: those that start two FMAs of 64
bytes per cycle (Sapphire Rapids), where moving, transforming and summing weigh more than products, and those that
start one (Zen 3 and 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..problem import DTYPE_BYTES, ConvProblem, Layout, Pass
from .linear_time import fewer_lanes, rounded_up, used_share

Outputs = tuple[int, int, int]

FEWEST_TILES, MOST_TILES, FEWEST_BOXES = 8, 96, 16
"""Of a box, and boxes unless each would have fewer tiles (csrc/algorithm/winograd_blocking.h)."""

WEIGHT_BYTES_IN_CACHE = 1 << 20
"""Up to which a box finds transformed weights in its core's own cache."""


LARGE_OUTPUT_BYTES, LARGE_OUTPUT = 16 << 20, 1.6
"""From which on an output in ncdhw, which is transposed, takes so many times as long to store."""


POOLED_OUTPUT = 0.4
"""Of the time of an output where only what is pooled is stored."""


class GatherCosts(NamedTuple):
    """Of a product, a source voxel of a channel, an output of a channel, a transformed weight, one that a box reads
    from beyond its core's cache, and of a call."""

    product: float
    source: float
    output: float
    weight: float
    reread: float
    call: float


GATHER_COSTS: dict[Layout, GatherCosts] = {
    "ncdhw": GatherCosts(2.55, 52, 125, 220, 16, 5e6),
    "ndhwc": GatherCosts(1.92, 59, 94, 250, 16, 3e6),
}


class GradWeightCosts(NamedTuple):
    """Of a product, a transformed source value, a gradient value, a sum that a box adds to."""

    product: float
    point: float
    gradient: float
    total: float


GRAD_WEIGHT_COSTS: dict[Layout, GradWeightCosts] = {
    "ncdhw": GradWeightCosts(2.5, 10, 200, 90),
    "ndhwc": GradWeightCosts(2.0, 8, 185, 100),
}


def expected_time(problem: ConvProblem, pass_: Pass, outputs: Outputs, vector_bytes: int, cheap: bool) -> float:
    """Of a pass in tiles of `outputs`; `cheap` where two wide FMAs start per cycle."""
    lanes, wide = vector_bytes // DTYPE_BYTES[problem.dtype], fewer_lanes(problem)
    if not cheap:
        return wide * _time_where_products_cost(problem, pass_, outputs, vector_bytes)
    if pass_ == "grad_weight":
        return wide * _grad_weight_time(problem, outputs, lanes)
    return wide * _gather_time(problem, pass_, outputs, lanes, wide)


def _gather_time(problem: ConvProblem, pass_: Pass, outputs: Outputs, lanes: int, wide: float) -> float:
    """In values of float32, each of `wide` values of its own: boxes then have fewer tiles, weights leave the caches."""
    sources, targets = problem.in_channels, problem.out_channels
    voxels = problem.batch * math.prod(problem.input_size)
    if pass_ == "grad_input":
        sources, targets = targets, sources
        voxels = problem.batch * math.prod(problem.output_size)
    tiles, points, weights = _counts(problem, pass_, outputs)
    values = weights * sources * targets
    packed, stored = rounded_up(sources, lanes), rounded_up(targets, lanes)
    cost, written = GATHER_COSTS[problem.layout], tiles * math.prod(outputs)
    output = cost.output
    if problem.pool is not None:
        output *= POOLED_OUTPUT
    elif problem.layout == "ncdhw" and written * targets * DTYPE_BYTES[problem.dtype] >= LARGE_OUTPUT_BYTES:
        output *= LARGE_OUTPUT
    time = cost.product * tiles * points * sources * stored + cost.source * voxels * packed + output * written * stored
    if values * DTYPE_BYTES[problem.dtype] > WEIGHT_BYTES_IN_CACHE:
        time += cost.reread * values * max(1.0, min(FEWEST_BOXES, tiles / FEWEST_TILES), wide * tiles / MOST_TILES)
    return (time + cost.weight * wide**2 * values + cost.call) * _held_up(outputs, problem)


def _held_up(outputs: Outputs, problem: ConvProblem) -> float:
    """Tiles of four outputs on several axes leave room for few of them in a box; rows of ncdhw like long tiles."""
    if problem.stride != (1, 1, 1):
        return 1.0
    fours = outputs.count(4)
    if fours == 2:
        return 1.5 if problem.kernel_size[0] == 1 else 1.12
    if fours == 3:
        return 1.45
    return 1.1 if problem.layout == "ncdhw" and outputs[1] == 4 else 1.0


def _grad_weight_time(problem: ConvProblem, outputs: Outputs, lanes: int) -> float:
    """Both operands are transformed, each once for every block of channels of the other; splits of the tiles have sums
    of their own, which pass through memory where they are many. Half a vector takes as long to transform as a whole."""
    sources, targets = problem.in_channels, problem.out_channels
    source_blocks, target_blocks = _channel_blocks(problem)
    tiles, points, weights = _counts(problem, "grad_weight", outputs)
    boxes = max(1.0, min(-(-FEWEST_BOXES // (source_blocks * target_blocks)), tiles / FEWEST_TILES))
    cost = GRAD_WEIGHT_COSTS[problem.layout]
    products = points * rounded_up(sources, max(lanes // 2, 1)) * rounded_up(targets, lanes)
    source = points * rounded_up(sources, lanes) * target_blocks
    gradient = math.prod(outputs) * rounded_up(targets, lanes) * source_blocks
    time = tiles * (cost.product * products + cost.point * source + cost.gradient * gradient)
    return time + cost.total * boxes * weights * sources * targets + GATHER_COSTS[problem.layout].call


def _time_where_products_cost(problem: ConvProblem, pass_: Pass, outputs: Outputs, vector_bytes: int) -> float:
    """Products run at 0.82 of peak; loading, transforming and storing an output voxel takes as long as 3.6 (ncdhw: 5.2)
    of its direct products for each channel, averaged harmonically; transforming a weight takes 8 per point; and weights
    that exceed the caches are read again for every box of tiles, sooner with strides, whose boxes have fewer tiles, and
    which have as many input voxels to an output voxel as their product. grad_weight transforms two tensors, each once
    for every block of channels of the other, and transforms its sums back, which wait in memory for those of other
    splits of the tiles unless there are many blocks.
    """
    lanes = vector_bytes // DTYPE_BYTES[problem.dtype]
    channels, strides = (problem.in_channels, problem.out_channels), math.prod(problem.stride)
    targets = channels[0] if pass_ == "grad_input" else channels[1]
    used = used_share(targets, lanes // 2 if vector_bytes == 64 and pass_ != "grad_weight" else lanes)
    each = 3.6 if problem.layout == "ndhwc" else 5.2
    tiles, points, weights = _counts(problem, pass_, outputs)
    spilling = 1.0
    if pass_ == "grad_weight":
        used *= used_share(channels[0], lanes // 2)  # rows of a register tile
        source_blocks, target_blocks = _channel_blocks(problem)
        moving = each * (source_blocks / channels[0] + strides * target_blocks / channels[1])
        finishing = 128.0 if source_blocks * target_blocks < 16 else 64.0
    else:
        moving, finishing = each * (1 / channels[0] + strides / channels[1]) / 2, 8.0
        most_bytes = (16 if strides == 1 else 4) << 20
        if weights * math.prod(channels) * DTYPE_BYTES[problem.dtype] > most_bytes:
            spilling = 1.7
    # Input voxels among which an output voxel's products are shared out.
    shared = strides if pass_ == "grad_input" else 1
    moved = math.prod(problem.kernel_size) * moving * tiles * math.prod(outputs) / shared
    return (tiles * points * spilling / (0.82 * used) + moved + finishing * points) * math.prod(channels)


def _counts(problem: ConvProblem, pass_: Pass, outputs: Outputs) -> tuple[int, int, int]:
    """Tiles, products of a tile for a pair of channels, and the weights that stand for the taps."""
    size: tuple[int, ...] = problem.input_size if pass_ == "grad_input" else problem.output_size
    if problem.pool is not None:
        size = tuple(count * window for count, window in zip(problem.pooled_size, problem.pool.window, strict=True))
    tiles = problem.batch * math.prod(map(_tiles, size, outputs, problem.dilation))
    points = math.prod(map(_points, outputs, problem.kernel_size, problem.stride))
    return tiles, points, math.prod(map(_weights, outputs, problem.kernel_size, problem.stride))


def _points(outputs: int, kernel: int, stride: int) -> int:
    """Products of a tile along an axis."""
    return outputs + kernel - 1 if stride == 1 else 5


def _weights(outputs: int, kernel: int, stride: int) -> int:
    """What three taps are transformed to along an axis."""
    return outputs + kernel - 1 if stride == 1 else 4


def _tiles(count: int, outputs: int, dilation: int) -> int:
    """Along an axis: every residue modulo the dilation has tiles of its own, as many as the first."""
    return min(count, dilation) * -(-count // dilation // outputs)


def _channel_blocks(problem: ConvProblem) -> tuple[int, int]:
    """Of grad_weight: of 256 bytes of source channels, of 512 of target channels."""
    bytes_ = DTYPE_BYTES[problem.dtype]
    return -(-problem.in_channels * bytes_ // 256), -(-problem.out_channels * bytes_ // 512)
