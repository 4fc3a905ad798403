"""How depthwise and small-group passes are cut into programs: what a lane, a thread and a program compute."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from .triton_common import INTERPRETED, ceil_div, power_of_2

Triple = tuple[int, int, int]

PROGRAMS = 2 if INTERPRETED else 528
"""Programs wanted: four for each multiprocessor of the largest Hopper GPU. The interpreter runs one after the other."""

WARPS = 4

TILES: tuple[tuple[int, int], ...] = ((1, 1),) if INTERPRETED else ((4, 4), (4, 2), (2, 2), (1, 2), (1, 1))
"""(height, width) of the outputs that a lane computes at a time, what is best for long problems first.

With 3 x 3 x 3 taps a lane loads and converts (height + 2) * (width + 2) values for height * width outputs. In the
interpreter an operation takes as long for many lanes as for few.
"""

TIMED_TILES = ((4, 4), (4, 2), (2, 4), (8, 2), (2, 2))
"""What tuning tries."""

LEAST_DEPTH = 8
"""Least outputs along the depth in one program: each walk starts with the planes of the taps before it."""

LARGEST_WALK = 128
"""Most taps whose sums are carried along the depth; the body of the walk is unrolled over taps and outputs."""

LARGEST_BODY = 2048
"""Most multiplications of one lane in the body of a loop, which is unrolled."""

HELD_WEIGHTS = 64
"""Most weights that a thread keeps in registers; of larger kernels it loads them again for each plane."""

LARGEST_LANES = 4096 if INTERPRETED else None

LARGEST_SUMS = 96
"""Most sums that a lane of grad_weight keeps, one for each tap."""

LARGEST_STATE = 128
"""Most values that a thread keeps in registers from plane to plane: sums, and weights or gradients."""

LARGEST_LANES_OF_GRADIENT = 32 if INTERPRETED else None
"""The interpreter adds lanes up one by one."""

_PATTERN = re.compile(r"h(\d+)w(\d+)d(\d+)", re.ASCII)


class Cut(NamedTuple):
    """The outputs of a lane, as a value with a short text form: what tuning tries and remembers.

    Attributes:
        height, width: in one plane, at a time.
        depth: planes, one after the other.

    Example:
        >>> str(Cut(4, 2, 15))
        'h4w2d15'
        >>> Cut.parse("h4w2d15")
        Cut(height=4, width=2, depth=15)
    """

    height: int
    width: int
    depth: int

    def __str__(self) -> str:
        return f"h{self.height}w{self.width}d{self.depth}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """The cut that `str(cut)` wrote.

        Raises:
            ValueError: the text is not of that form, or an extent is zero.
        """
        match = _PATTERN.fullmatch(text)
        if match is None or "0" in match.groups():
            raise ValueError(f"{text!r} names no outputs of a lane; expected a form like 'h4w2d15'")
        return cls(*map(int, match.groups()))


def cuts(depth: int) -> list[Cut]:
    """What is worth timing: tiles of different sizes, the whole depth at a time and short parts of it."""
    parts = {depth, ceil_div(depth, ceil_div(depth, LEAST_DEPTH))}
    return [Cut(height, width, part) for height, width in TIMED_TILES for part in sorted(parts, reverse=True)]


class Tiles(NamedTuple):
    """What a program computes.

    Attributes:
        height, width: outputs of a lane in one plane.
        depth: outputs of a lane along the depth, one plane after the other.
        lanes: lanes of a program.
        walk: whether sums (of grad_weight: gradients) are carried from plane to plane, so that each plane of the
            source is loaded once; else once for each tap along the depth.
        hold: whether the weights stay in registers.
    """

    height: int
    width: int
    depth: int
    lanes: int
    walk: bool
    hold: bool


def tiles(
    batch: int,
    channels: int,
    size: Sequence[int],
    taps: Sequence[int],
    summed: int,
    channels_last: bool,
    can_walk: bool,
    cut: Cut | None = None,
) -> Tiles:
    """The tiles of a pass with `channels` results (N, channels, *size) that sum over taps and `summed` channels.

    The largest tile that leaves `PROGRAMS` programs, unless `cut` says which. Along channels, which lie side by side in
    channels_last_3d, a thread has two lanes, so that a warp loads whole cache lines, unless their weights need too many
    registers.
    """
    count = math.prod(taps)
    walk = can_walk and count <= LARGEST_WALK
    lanes_per_thread = 2 if channels_last and count <= HELD_WEIGHTS // 2 else 1
    hold = summed == 1 and count * lanes_per_thread <= HELD_WEIGHTS
    body = (count if walk else count // taps[0]) * lanes_per_thread
    for height, width in TILES if cut is None else [(cut.height, cut.width)]:
        columns = channels * ceil_div(size[1], height) * ceil_div(size[2], width)
        lanes = LARGEST_LANES or 32 * WARPS * lanes_per_thread
        lanes = power_of_2(columns, 32, lanes)
        blocks = batch * ceil_div(columns, lanes)
        chunks = min(ceil_div(PROGRAMS, blocks), ceil_div(size[0], LEAST_DEPTH))
        state = ((taps[0] if walk else 1) * height * width + (count if hold else 0)) * lanes_per_thread
        fits = height <= size[1] and width <= size[2] and body * height * width <= LARGEST_BODY
        fits = fits and state <= LARGEST_STATE
        depth = ceil_div(size[0], chunks) if cut is None else cut.depth
        chosen = Tiles(height, width, depth, lanes, walk, hold)
        if fits and blocks * chunks >= PROGRAMS:
            return chosen
    return chosen


class GradientTiles(NamedTuple):
    """What a program of grad_weight computes.

    Attributes:
        height, width, depth, walk: as in `Tiles`, of the gradients.
        positions, channels: lanes of a program.
    """

    height: int
    width: int
    depth: int
    positions: int
    channels: int
    walk: bool


def gradient_tiles(
    batch: int,
    out_channels: int,
    channels: int,
    size: Sequence[int],
    taps: Sequence[int],
    channels_last: bool,
    can_walk: bool,
    cut: Cut | None = None,
) -> GradientTiles:
    """The tiles of the gradient with respect to a weight (out_channels, channels, *taps), from outputs of a size."""
    walk = can_walk and math.prod(taps) <= LARGEST_SUMS
    count = math.prod(taps) if walk else taps[1] * taps[2]
    repeats = channels if walk else channels * taps[0]
    lanes_per_thread = 2 if channels_last and count <= HELD_WEIGHTS // 2 else 1
    lanes = LARGEST_LANES_OF_GRADIENT or 32 * WARPS * lanes_per_thread
    block = power_of_2(out_channels, 1, 32 * lanes_per_thread) if channels_last else 1
    programs = ceil_div(out_channels, block) * repeats
    for height, width in TILES if cut is None else [(cut.height, cut.width)]:
        positions = batch * ceil_div(size[1], height) * ceil_div(size[2], width)
        block_positions = power_of_2(positions, 1, max(1, lanes // block))
        blocks = programs * ceil_div(positions, block_positions)
        chunks = min(ceil_div(PROGRAMS, blocks), ceil_div(size[0], LEAST_DEPTH))
        state = ((taps[0] if walk else 1) * height * width + count) * lanes_per_thread
        depth = ceil_div(size[0], chunks) if cut is None else cut.depth
        chosen = GradientTiles(height, width, depth, block_positions, block, walk)
        fits = height <= size[1] and width <= size[2] and state <= LARGEST_STATE
        if fits and blocks * chunks >= PROGRAMS:
            return chosen
    return chosen
