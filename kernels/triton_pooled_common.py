"""What the implicit-GEMM kernels fused with a max-pool share: tiles of voxels, offsets, a choice of block sizes.

The rows of a block are a tile of voxels, (samples, depth, height, width), each extent a power of two: what is divided
by the sizes of a tensor is one number for each block, and rows are taken apart by shifts. Neighbours in a tile read the
same input.

Tensors are dense in one of the two layouts, so strides follow from sizes. Channels are constants of a kernel: Triton
then knows how many values in a row stand at aligned addresses, and loads them together. Offsets inside of a sample are
32-bit numbers unless a sample is larger (LONG); those of samples always have 64 bits.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import itertools
import math

import triton
import triton.language as tl
from torch import Tensor

from .triton_common import ceil_div, is_inside

Triple = tuple[int, int, int]
Tile = tuple[int, int, int, int]


def needs_long_offsets(*tensors: Tensor) -> bool:
    """Whether an offset inside of a sample, or a weight, may pass 2**31; a window may reach past the last voxel."""
    return any(tensor[0].numel() >= 2**30 for tensor in tensors)


def tile_of(batch: int, size: tuple[int, ...], rows: int) -> Tile:
    """`rows` voxels (a power of two) of few samples, such that few of them lie outside; wide for coalesced loads."""
    sizes = (batch, *size)
    powers = [2**exponent for exponent in range(rows.bit_length())]

    def cost(tile: tuple[int, ...]) -> float:
        covered = math.prod(ceil_div(extent, side) * side for extent, side in zip(sizes, tile, strict=True))
        return covered * (1 + 1 / (4 * tile[3]))

    candidates = [tile for tile in itertools.product(powers, repeat=4) if math.prod(tile) == rows]
    samples, depth, height, width = min(candidates, key=cost)
    return samples, depth, height, width


def count_tiles(batch: int, size: tuple[int, ...], tile: Tile) -> int:
    return math.prod(ceil_div(extent, side) for extent, side in zip((batch, *size), tile, strict=True))


@triton.jit
def tile_voxels(tile, rows, depth, height, width, TILE: tl.constexpr):
    """(sample, d, h, w) of some rows of a tile."""
    tiles_d = (depth + TILE[1] - 1) // TILE[1]
    tiles_h = (height + TILE[2] - 1) // TILE[2]
    tiles_w = (width + TILE[3] - 1) // TILE[3]
    w = tile % tiles_w * TILE[3] + rows % TILE[3]
    h = tile // tiles_w % tiles_h * TILE[2] + rows // TILE[3] % TILE[2]
    d = tile // tiles_w // tiles_h % tiles_d * TILE[1] + rows // (TILE[3] * TILE[2]) % TILE[1]
    n = tile // tiles_w // tiles_h // tiles_d * TILE[0] + rows // (TILE[3] * TILE[2] * TILE[1])
    return n, d, h, w


@triton.jit
def window_voxels(offset, p, q, r, WINDOW: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr):
    """(d, h, w) of the voxel at an offset, counted row by row, of the window of pooled voxel (p, q, r)."""
    d = p * POOL_STRIDE[0] - POOL_PADDING[0] + offset // (WINDOW[1] * WINDOW[2])
    h = q * POOL_STRIDE[1] - POOL_PADDING[1] + offset // WINDOW[2] % WINDOW[1]
    w = r * POOL_STRIDE[2] - POOL_PADDING[2] + offset % WINDOW[2]
    return d, h, w


@triton.jit
def dense_strides(depth, height, width, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, LONG: tl.constexpr):
    """Strides of (sample, channel, d, h, w) of a dense tensor."""
    if LONG:
        height = tl.cast(height, tl.int64)
        width = tl.cast(width, tl.int64)
    sample = tl.cast(depth, tl.int64) * height * width * CHANNELS
    if CHANNELS_LAST:
        strides = sample, 1, height * width * CHANNELS, width * CHANNELS, CHANNELS
    else:
        strides = sample, depth * height * width, height * width, width, 1
    return strides


@triton.jit
def tap_channel(
    index, first, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Tap and channel of the BLOCK entries `index` from `first` on, of the weights of one output channel in memory.

    Where BLOCK divides the channels, all of them have one tap, which is a scalar.
    """
    if CHANNELS_LAST:
        tap = first // CHANNELS if CHANNELS % BLOCK == 0 else index // CHANNELS
        channel = index % CHANNELS
    else:
        tap = index % TAPS
        channel = index // TAPS
    return tap, channel


@triton.jit
def tap_place(tap, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """How far a tap lies behind the first one along (d, h, w), in voxels of the input."""
    d = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
    h = tap // KERNEL[2] % KERNEL[1] * DILATION[1]
    w = tap % KERNEL[2] * DILATION[2]
    return d, h, w


@triton.jit
def taps_inside(rows, d, h, w, depth, height, width, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """Of each of `rows` that counts, a bit for every tap of at most 32 whose voxel lies in the input.

    (d, h, w) is the voxel of the first tap. Made once for a row, axis by axis: what a product then asks of a tap is two
    instructions and not ten.
    """
    bits = taps_of_axis(rows.to(tl.int32), w, width, KERNEL[2], DILATION[2], 1)
    bits = taps_of_axis(bits, h, height, KERNEL[1], DILATION[1], KERNEL[2])
    return taps_of_axis(bits, d, depth, KERNEL[0], DILATION[0], KERNEL[1] * KERNEL[2])


@triton.jit
def taps_of_axis(bits, index, size, TAPS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """The WIDTH `bits` of the axes behind this one, for every tap of it that lies inside."""
    result = tl.full(index.shape, 0, tl.int32)
    for tap in tl.static_range(TAPS):
        result |= tl.where(is_inside(index, tap * STEP, size), bits << (tap * WIDTH), 0)
    return result


@triton.jit
def tap_is_inside(
    inside, tap, d, h, w, depth, height, width, KERNEL: tl.constexpr, DILATION: tl.constexpr, IN_BITS: tl.constexpr
):
    """Whether the voxel of a tap lies in the input; `inside` are bits of `taps_inside`, or which rows count."""
    if IN_BITS:
        inside = ((inside >> tap) & 1) != 0
    else:
        d_tap, h_tap, w_tap = tap_place(tap, KERNEL, DILATION)
        inside &= is_inside(d, d_tap, depth) & is_inside(h, h_tap, height) & is_inside(w, w_tap, width)
    return inside
