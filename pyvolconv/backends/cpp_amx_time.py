"""How long `cpp.amx` is expected to take, in FMAs of float32 at peak: its cost model.

The numbers are fitted to measurements on a Sapphire Rapids (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..problem import ConvProblem, Layout, Pass

PRODUCTS = {1: 1, 2: 3, 3: 6}
"""Products of two values' parts that are summed, by the number of parts."""

TILE, STEP = 16, 32
"""Rows and columns of a tile of sums, and the summed values of one product of tiles."""

PRODUCTS_PER_FMA = 7.5

TOUCHING: dict[Layout, float] = {"ndhwc": 2.0, "ncdhw": 2.0}
"""How many times as long storing takes where each residue of a stride is one tap, so that little else is done."""

NARROW_ROWS = 1.3
"""The same of products with the taps of all residues, results of which are columns."""

CALL = 4e6

FEWEST_VOXELS = 1024
"""In grad_weight, of the part of the volume that one of several sums is over."""


class GatherCosts(NamedTuple):
    """Of a part of a source value each time it is packed, of a result, of a part of a weight."""

    packing: float
    storing: float
    weight: float


GATHER_COSTS: dict[str, dict[Layout, GatherCosts]] = {
    "float32": {"ndhwc": GatherCosts(18, 37, 50), "ncdhw": GatherCosts(26, 52, 85)},
    "float16": {"ndhwc": GatherCosts(15, 25, 70), "ncdhw": GatherCosts(24, 60, 70)},
    "bfloat16": {"ndhwc": GatherCosts(26, 24, 119), "ncdhw": GatherCosts(40, 49, 119)},
}


class GradWeightCosts(NamedTuple):
    """Of a product of two tiles by the number of parts, of a source value each time it is packed, of each part of it,
    of a value of the gradient, of a tile of sums."""

    step: dict[int, float]
    source: float
    part: float
    gradient: float
    tile: float


GRAD_WEIGHT_COSTS = {
    "float32": GradWeightCosts({1: 1100, 2: 2400, 3: 4400}, 85, 10, 95, 17_000),
    "float16": GradWeightCosts({2: 3060}, 65, 0, 42, 29_000),
    "bfloat16": GradWeightCosts({1: 1440}, 40, 0, 33, 31_000),
}


def gather_time(problem: ConvProblem, pass_: Pass, parts: int, transformed: Sequence[int]) -> float:
    """Of forward and grad_input, rows and columns of tiles that are computed in vain included.

    Args:
        problem, pass_: what is computed.
        parts: bfloat16 values of a value.
        transformed: axes of which one has two products for three taps.
    """
    sources, targets, size = problem.in_channels, problem.out_channels, problem.output_size
    strides, packed, stored = (1, 1, 1), float(math.prod(problem.stride)), 1.0
    columns = _computed(targets, TILE) * targets
    if pass_ == "grad_input":
        sources, targets, size = targets, sources, problem.input_size
        columns = _computed(targets, TILE) * targets
        strides, residues = problem.stride, math.prod(problem.stride)
        packed = 1.0  # where a source value is packed for every residue of the stride
        if residues <= 8 and max(problem.dilation) == 1:
            packed = 1 / residues
            if residues > 1 and problem.kernel_size == strides:
                stored = TOUCHING[problem.layout]
            if residues * targets <= 2 * TILE:
                # All residues' results are columns of one product with the taps of all.
                union = math.prod(-(-k // s) for k, s in zip(problem.kernel_size, strides, strict=True))
                shared = NARROW_ROWS * union * _computed(residues * targets, TILE) * targets
                columns = min(columns, shared * residues / math.prod(problem.kernel_size))
    taps = [max(1.0, k / s) for k, s in zip(problem.kernel_size, strides, strict=True)]
    mixed = [_computed(size[axis], 2) for axis in transformed]
    along = 2 / 3 * min(mixed) if mixed else 1.0
    if problem.dilation[2] == 1:
        steps = -(-math.ceil(taps[2] * sources) // STEP)
    else:
        steps = math.ceil(taps[2]) * -(-sources // STEP)
    width = math.ceil(size[2] / strides[2])
    rows = min(_computed(width, TILE), 1.05 * (width + problem.kernel_size[2] - 1) / width)
    products = PRODUCTS[parts] * taps[0] * taps[1] * along * steps * STEP * rows * columns
    around = 2.0 if mixed else 1.5 if max(problem.kernel_size[:2]) > 1 else 1.0
    cost = GATHER_COSTS[problem.dtype][problem.layout]
    voxel = (
        products / PRODUCTS_PER_FMA + around * packed * sources * parts * cost.packing + targets * stored * cost.storing
    )
    return problem.batch * math.prod(size) * voxel + math.prod(problem.weight_shape) * parts * cost.weight + CALL


def grad_weight_time(problem: ConvProblem, parts: int) -> float:
    """Rows of tiles are target channels, columns are taps along the width and source channels, and 32 voxels are summed
    in a step."""
    voxels = problem.batch * math.prod(problem.output_size)
    axes = list(zip(problem.kernel_size, problem.stride, problem.dilation, strict=True))
    packed = voxels * math.prod(s + ((k - 1) * min(d, 2) + 1 - s) / 8 for k, s, d in axes[:2])
    width, kernel = problem.output_size[2], problem.kernel_size[2]
    positions = ((width - 1) * problem.stride[2] + kernel) / width
    columns = -(-kernel * problem.in_channels // TILE)
    rows = -(-problem.out_channels // TILE)
    tiles = math.prod(problem.kernel_size[:2]) * columns * rows
    splits = max(1.0, min(2000 / tiles, 8.0, voxels / FEWEST_VOXELS))
    cost = GRAD_WEIGHT_COSTS[problem.dtype]
    products = voxels / (STEP * 0.94) * tiles * cost.step[parts]
    packing = packed * (problem.in_channels * positions * cost.source + TILE * columns * parts * cost.part)
    time = products + packing + voxels * TILE * rows * cost.gradient + splits * tiles * cost.tile + CALL
    return 2 * time if 2 < kernel <= problem.stride[2] else time  # windows apart from one another: packed one by one


def _computed(size: int, tile: int) -> float:
    """How many times as much is computed where an axis is cut into tiles."""
    return -(-size // tile) * tile / size
