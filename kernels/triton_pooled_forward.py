"""Convolution, activation and max-pool as one implicit GEMM: what is pooled exists in registers only.

The rows of the product are (pooled voxel, voxel of its window), the window innermost and filled up to a power of two.
A block holds whole windows: once its sums are complete, the voxels of each window compete in pairs of neighbours, and
the winners again, so that the first maximum wins, and the last NaN. Rows that are no voxel never win.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_common import INTERPRETED, Launch, ceil_div, default_blocks, is_inside
from .triton_epilogue import activate
from .triton_pooled_common import (
    Triple,
    count_tiles,
    dense_strides,
    needs_long_offsets,
    tap_channel,
    tap_is_inside,
    tap_place,
    taps_inside,
    tile_of,
    tile_voxels,
    window_voxels,
)

LEAST_POOLED = 64 if INTERPRETED else 1
"""Pooled voxels in a block, however large their windows are."""


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    activation: str,
    negative_slope: float,
    window: Triple,
    pool_stride: Triple,
    pool_padding: Triple,
    output_size: Triple,
    pooled: Tensor,
    code: Tensor | None,
    channels_last: bool,
    input_precision: str = "ieee",
    widen: bool = False,
    blocks: Blocks | None = None,
) -> list[Launch]:
    """The launch that writes pooled values and, unless `code` is None, their codes, as `backends.base` defines them.

    Args:
        activation: one of `pyvolconv.epilogue.ACTIVATIONS`.
        negative_slope: of leaky_relu.
        output_size: (depth, height, width) of what is pooled.
        channels_last: how all tensors but the bias are stored.
        input_precision: how `tl.dot` treats float32 operands, "ieee" or "tf32".
        widen: multiply in float32, for a dtype that `tl.dot` does not take where this runs.
        blocks: how it is launched; m counts the rows of whole windows.
    """
    out_channels, channels, *kernel = weight.shape
    out_channels //= groups
    batch, _, *size_pooled = pooled.shape
    window_rows = triton.next_power_of_2(math.prod(window))
    rows = batch * math.prod(size_pooled) * window_rows
    blocks = blocks or default_blocks(rows, out_channels, channels * math.prod(kernel), pooled.element_size())
    block_pooled = max(LEAST_POOLED, blocks.m // window_rows)
    tile = tile_of(batch, tuple(size_pooled), block_pooled)
    grid = count_tiles(batch, tuple(size_pooled), tile) * ceil_div(out_channels, blocks.n) * groups
    # Whether every row is a voxel, those of pooled voxels that do not exist aside.
    full = window_rows == math.prod(window) and all(
        padded == 0 and (pooled_axis - 1) * step + extent <= size
        for padded, pooled_axis, step, extent, size in zip(
            pool_padding, size_pooled, pool_stride, window, output_size, strict=True
        )
    )
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": weight if bias is None else bias,
        "pooled_ptr": pooled,
        "code_ptr": pooled if code is None else code,
        "batch": batch,
        "size": tuple(x.shape[2:]),
        "size_out": output_size,
        "size_pooled": tuple(size_pooled),
        "padding": padding,
        "GROUPS": groups,
        "CHANNELS": channels,
        "OUT_CHANNELS": out_channels,
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "WINDOW": window,
        "POOL_STRIDE": pool_stride,
        "POOL_PADDING": pool_padding,
        "ACTIVATION": activation,
        "SLOPE": negative_slope,
        "FULL": full,
        "HAS_BIAS": bias is not None,
        "HAS_CODE": code is not None,
        "CHANNELS_LAST": channels_last,
        "LONG": needs_long_offsets(x, weight, pooled),
        "WIDEN": widen,
        "PRECISION": input_precision,
        "TILE": tile,
        "BLOCK_POOLED": block_pooled,
        "WINDOW_ROWS": window_rows,
        "LEVELS": window_rows.bit_length() - 1,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
    }
    return [Launch(forward_max_pool_kernel, (grid,), arguments, blocks.options)]


@triton.jit
def halves(windows, LEVEL: tl.constexpr, BLOCK_POOLED: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW_ROWS: tl.constexpr):
    """The first and the second of each pair of neighbours that are left of a window after LEVEL rounds."""
    return tl.split(tl.reshape(windows, (BLOCK_POOLED, BLOCK_N, WINDOW_ROWS >> (LEVEL + 1), 2)))


@triton.jit
def by_window(rows, BLOCK_POOLED: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW_ROWS: tl.constexpr):
    """(pooled voxel, channel, row of the window) of a block."""
    return tl.permute(tl.reshape(rows, (BLOCK_POOLED, WINDOW_ROWS, BLOCK_N)), (0, 2, 1))


@triton.jit
def forward_max_pool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pooled_ptr,
    code_ptr,
    batch,
    size,
    size_out,
    size_pooled,
    padding,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CODE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LONG: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_POOLED: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth, height, width = size
    depth_out, height_out, width_out = size_out
    depth_pooled, height_pooled, width_pooled = size_pooled
    x_n, x_c, x_d, x_h, x_w = dense_strides(depth, height, width, GROUPS * CHANNELS, CHANNELS_LAST, LONG)
    y_n, y_c, y_d, y_h, y_w = dense_strides(
        depth_pooled, height_pooled, width_pooled, GROUPS * OUT_CHANNELS, CHANNELS_LAST, LONG
    )
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    summed: tl.constexpr = taps * CHANNELS
    block_rows: tl.constexpr = BLOCK_POOLED * WINDOW_ROWS

    # Blocks of output channels follow each other: they read the same voxels.
    blocks_n: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    block_n = program % blocks_n
    group = program // blocks_n % GROUPS
    tile = program // blocks_n // GROUPS

    row = tl.arange(0, block_rows)[:, None]  # (M, 1)
    offset = row % WINDOW_ROWS
    n, p, q, r = tile_voxels(tile, row // WINDOW_ROWS, depth_pooled, height_pooled, width_pooled, TILE)
    d, h, w = window_voxels(offset, p, q, r, WINDOW, POOL_STRIDE, POOL_PADDING)
    exists = (n < batch) & is_inside(d, 0, depth_out) & is_inside(h, 0, height_out) & is_inside(w, 0, width_out)
    exists &= offset < WINDOW[0] * WINDOW[1] * WINDOW[2]
    d_first = d * STRIDE[0] - padding[0]
    h_first = h * STRIDE[1] - padding[1]
    w_first = w * STRIDE[2] - padding[2]
    in_bits: tl.constexpr = taps <= 32
    inside = exists
    if in_bits:
        inside = taps_inside(exists, d_first, h_first, w_first, depth, height, width, KERNEL, DILATION)
    x_rows = x_ptr + n.to(tl.int64) * x_n + group * CHANNELS * x_c
    x_rows += d_first * x_d + h_first * x_h + w_first * x_w  # (M, 1)
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    weight_rows = weight_ptr + (group * OUT_CHANNELS + o[:, None]).to(tl.int64) * summed  # (N, 1)
    o_valid = o[:, None] < OUT_CHANNELS

    total = tl.full((block_rows, BLOCK_N), 0.0, tl.float32)
    for first in range(0, summed, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)[None, :]  # (1, K)
        tap, c = tap_channel(index, first, CHANNELS, taps, CHANNELS_LAST, BLOCK_K)
        d_tap, h_tap, w_tap = tap_place(tap, KERNEL, DILATION)
        read = tap_is_inside(inside, tap, d_first, h_first, w_first, depth, height, width, KERNEL, DILATION, in_bits)
        index_valid = index < summed
        x = tl.load(
            x_rows + (d_tap * x_d + h_tap * x_h + w_tap * x_w + c * x_c), mask=read & index_valid, other=0.0
        )  # (M, K)
        weight = tl.load(weight_rows + index, mask=o_valid & index_valid, other=0.0)  # (N, K)
        if WIDEN:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)

    o = o[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + group * OUT_CHANNELS + o, mask=o < OUT_CHANNELS, other=0.0).to(tl.float32)

    # Rounded where the plain passes round, so that the same values tie.
    dtype: tl.constexpr = pooled_ptr.dtype.element_ty
    value = total.to(dtype).to(tl.float32)
    largest = activate(value, ACTIVATION, SLOPE).to(dtype).to(tl.float32)
    code = offset if FULL else tl.where(exists, offset, -1)
    code = tl.broadcast_to(code, (block_rows, BLOCK_N))
    largest = by_window(largest, BLOCK_POOLED, BLOCK_N, WINDOW_ROWS)
    code = by_window(code, BLOCK_POOLED, BLOCK_N, WINDOW_ROWS)
    # The derivative of these does not follow from their value: the value before them is kept.
    keeps: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh"
    if keeps:
        value = by_window(value, BLOCK_POOLED, BLOCK_N, WINDOW_ROWS)
    for level in tl.static_range(LEVELS):
        largest, second = halves(largest, level, BLOCK_POOLED, BLOCK_N, WINDOW_ROWS)
        code, second_code = halves(code, level, BLOCK_POOLED, BLOCK_N, WINDOW_ROWS)
        wins = (second > largest) | (second != second)
        if not FULL:
            wins = (second_code >= 0) & (wins | (code < 0))
        largest = tl.where(wins, second, largest)
        code = tl.where(wins, second_code, code)
        if keeps:
            value, second_value = halves(value, level, BLOCK_POOLED, BLOCK_N, WINDOW_ROWS)
            value = tl.where(wins, second_value, value)
    largest = tl.reshape(largest, (BLOCK_POOLED, BLOCK_N))
    code = tl.reshape(code, (BLOCK_POOLED, BLOCK_N))
    if ACTIVATION == "relu":
        code = tl.where(largest <= 0, 255, code)  # NO_VOXEL
    if keeps:
        largest = tl.reshape(value, (BLOCK_POOLED, BLOCK_N))

    n, p, q, r = tile_voxels(tile, tl.arange(0, BLOCK_POOLED)[:, None], depth_pooled, height_pooled, width_pooled, TILE)
    valid = (n < batch) & (p < depth_pooled) & (q < height_pooled) & (r < width_pooled) & (o < OUT_CHANNELS)
    place = n.to(tl.int64) * y_n + (p * y_d + q * y_h + r * y_w) + (group * OUT_CHANNELS + o) * y_c
    tl.store(pooled_ptr + place, largest.to(dtype), mask=valid)
    if HAS_CODE:
        tl.store(code_ptr + place, code.to(tl.uint8), mask=valid)
