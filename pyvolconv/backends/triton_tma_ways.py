"""How `triton.tma` may cut up a pass, and how long each way is expected to take on a large Hopper GPU.

The model: a program takes a step in the time of its matrix products or in that of fetching its operands from the L2
cache, whichever is longer; programs run in waves, one to a multiprocessor; the sums of a split pass, and a tensor that
is copied into ndhwc, are written and read once more. Its constants come from data sheets and from published timings of
matrix products in Triton; they have not been fitted to measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ..problem import DTYPE_BYTES, ConvProblem, Pass, Size3
from .cuda_peak import BYTES_PER_SECOND, PEAK, arithmetic

if TYPE_CHECKING:
    from ..kernels.triton_blocks import Blocks

PROCESSORS = 132
"""Multiprocessors: how sums are split follows from the problem, never from the device."""
REACHED = 0.85
"""Of the peak, in the steps of a program."""
L2_BYTES_PER_SECOND = 7.5e12
LAUNCH, PROGRAM, STEP = 3e-6, 2e-6, 5e-8
"""Seconds that a launch, the begin and end of a program, and a step take on top."""
MOST_SPLITS = 16
MOST_WAYS = 9


class Way(NamedTuple):
    """How a pass is run, with a short text form.

    Attributes:
        blocks: the block of results of a program, and the summed values of one step.
        splits: parts of the sum, each of a program of its own.
        moved: of ncdhw, whether tensors are first copied into ndhwc; otherwise boxes are runs along the width.

    Example:
        >>> from pyvolconv.kernels.triton_blocks import Blocks
        >>> str(Way(Blocks(256, 128, 64, 8, 4), 2, True))
        'm256n128k64w8s4-2-moved'
        >>> Way.parse("m256n128k64w8s4-2").moved
        False
    """

    blocks: Blocks
    splits: int
    moved: bool

    def __str__(self) -> str:
        return f"{self.blocks}-{self.splits}" + ("-moved" if self.moved else "")

    @classmethod
    def parse(cls, text: str) -> Way:
        """What `str` wrote.

        Raises:
            ValueError: the text is not of that form.
        """
        from ..kernels.triton_blocks import Blocks

        blocks, _, rest = text.partition("-")
        splits, _, moved = rest.partition("-")
        if not splits.isdecimal() or int(splits) < 1 or moved not in ("", "moved"):
            raise ValueError(f"{text!r} is no way to run a pass; expected a form like 'm256n128k64w8s4-2-moved'")
        return cls(Blocks.parse(blocks), int(splits), bool(moved))


class _Product(NamedTuple):
    """A pass as a product: (voxels) x (columns), or for grad_weight (rows) x (columns) for each tap."""

    rows: int
    columns: int
    summed: int
    taps: int
    size: Size3
    batch: int


@lru_cache(maxsize=4096)
def ways(problem: ConvProblem, pass_: Pass) -> tuple[Way, ...]:
    """Those that are worth timing, the one that is expected to be fastest first."""
    every = {way: seconds(problem, pass_, way) for way in _possible(problem, pass_)}
    return tuple(sorted(every, key=lambda way: every[way])[:MOST_WAYS])


def seconds(problem: ConvProblem, pass_: Pass, way: Way) -> float:
    """The expected time of a pass."""
    product = _product(problem, pass_)
    m, n, k, *_ = way.blocks
    item_bytes = DTYPE_BYTES[problem.dtype]
    results, steps = _programs_and_steps(problem, pass_, product, way)
    steps_per_program = max(1.0, steps * _reaching_share(problem, pass_) / way.splits)
    step = max(
        2 * m * n * k / (REACHED * PEAK[arithmetic(problem)] / PROCESSORS),
        (m + n) * k * item_bytes / (L2_BYTES_PER_SECOND / PROCESSORS),
    )
    waves = -(-results * way.splits // PROCESSORS)
    total = LAUNCH + waves * (PROGRAM + steps_per_program * (step + STEP))
    values = math.prod(problem.weight_shape) if pass_ == "grad_weight" else product.rows * product.columns
    if pass_ == "grad_weight" or way.splits > 1:
        total += LAUNCH + 8 * way.splits * values / BYTES_PER_SECOND
    if way.moved:
        total += sum(LAUNCH + 2 * item_bytes * moved / BYTES_PER_SECOND for moved in _moved_values(problem, pass_))
    return float(max(total, problem.min_bytes(pass_) / BYTES_PER_SECOND))


def can_be_direct(problem: ConvProblem, pass_: Pass) -> bool:
    """Whether ncdhw can be described: rows in multiples of 16 bytes, and of 16-bit values, which may lie across."""
    widths = {"forward": problem.input_size[2:], "grad_input": problem.output_size[2:]}
    both = (problem.input_size[2], problem.output_size[2])
    item_bytes = DTYPE_BYTES[problem.dtype]
    return item_bytes == 2 and all(width * item_bytes % 16 == 0 for width in widths.get(pass_, both))


def _possible(problem: ConvProblem, pass_: Pass) -> Iterator[Way]:
    from ..kernels.triton_blocks import Blocks

    product = _product(problem, pass_)
    narrow = DTYPE_BYTES[problem.dtype] // 2
    if pass_ == "grad_weight":
        sides = [(128, 256), (128, 128), (64, 128), (64, 64), (64, 32)]
    else:
        sides = [(256, 128), (128, 256), (128, 128), (256, 64), (128, 64), (64, 64)]
    moves = [False]
    if problem.layout == "ncdhw":
        moves = [True, False] if can_be_direct(problem, pass_) else [True]
    for m, n in sides:
        least_m, least_n = (64, 32) if pass_ == "grad_weight" else (64, 64)
        if n > least_n and n >= 2 * product.columns:
            continue
        if pass_ == "grad_weight" and m > least_m and m >= 2 * product.rows:
            continue
        k = 64 if pass_ == "grad_weight" or product.summed % 64 == 0 or product.summed > 128 else 32
        blocks = Blocks(m, n, k // narrow, 8 if m * n > 128 * 64 else 4, 4)
        for moved in moves:
            programs, steps = _programs_and_steps(problem, pass_, product, Way(blocks, 1, moved))
            most = min(MOST_SPLITS, max(1, steps // 8), max(1, 4 * PROCESSORS // programs))
            parts = [Way(blocks, splits, moved) for splits in range(1, most + 1)]
            yield from sorted(parts, key=lambda way: seconds(problem, pass_, way))[:2]


def _product(problem: ConvProblem, pass_: Pass) -> _Product:
    taps = math.prod(problem.kernel_size)
    into, out = problem.in_channels, problem.out_channels
    if pass_ == "grad_weight":
        voxels = problem.batch * math.prod(problem.output_size)
        return _Product(out, into, voxels, taps, problem.output_size, problem.batch)
    size = problem.output_size if pass_ == "forward" else problem.input_size
    columns, summed = (out, into) if pass_ == "forward" else (into, out)
    return _Product(problem.batch * math.prod(size), columns, summed, taps, size, problem.batch)


def _programs_and_steps(problem: ConvProblem, pass_: Pass, product: _Product, way: Way) -> tuple[int, int]:
    """Programs of an unsplit sum, and the steps of each."""
    from ..kernels.triton_tma import box_of

    voxels = way.blocks.k if pass_ == "grad_weight" else way.blocks.m
    direct = problem.layout == "ncdhw" and not way.moved
    box = (1, 1, voxels) if direct else box_of(product.size, voxels)
    boxes = product.batch * math.prod(-(-size // side) for size, side in zip(product.size, box, strict=True))
    blocks_n = -(-product.columns // way.blocks.n)
    if pass_ == "grad_weight":
        return -(-product.rows // way.blocks.m) * blocks_n * product.taps, boxes
    return boxes * blocks_n, product.taps * -(-product.summed // way.blocks.k)


def _reaching_share(problem: ConvProblem, pass_: Pass) -> float:
    """Of the taps along the depth of every plane of results, or of boxes, those that meet the other tensor."""
    (begin, _), _, _ = problem.padding
    depth, dilation = problem.input_size[0], problem.dilation[0]
    met = sum(
        1
        for plane in range(problem.output_size[0])
        for tap in range(problem.kernel_size[0])
        if 0 <= plane - begin + tap * dilation < depth
    )
    walked = depth if pass_ == "grad_input" else problem.output_size[0]
    return met / (problem.kernel_size[0] * walked)


def _moved_values(problem: ConvProblem, pass_: Pass) -> list[int]:
    x, y = math.prod(problem.input_shape), math.prod(problem.output_shape)
    return {"forward": [x], "grad_input": [y], "grad_weight": [y, x]}[pass_]
