"""Gradients with respect to weight and bias, behind a max-pool, as an implicit GEMM over the voxels of all windows.

(output channels) x (tap, channel), summed over (pooled voxel, voxel of its window): each pooled value and its code are
read once for a whole window, and become as many rows, of which the chosen one holds the gradient. The gradient of the
bias is the sum of the same rows, in float32 whatever the product rounds its operands to.

As in `triton_grad_weight` the sum is split as the problem alone says, and a second kernel adds the partial results in
order.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_common import INTERPRETED, MIN_DOT_SIDE, Launch, ceil_div, default_blocks, is_inside, power_of_2
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

PROGRAMS = 528
"""Programs wanted in all: four for each multiprocessor of the largest Hopper GPU."""

MIN_STEPS = 4
"""Least blocks of voxels in one partial sum; below, writing the partials costs more than it gains."""

LARGEST_VOXELS = 16384 if INTERPRETED else 64
"""Voxels of windows in a block; more addresses than for 64 x 64 values take more registers than there are."""

LARGEST_COLUMNS = 1024 if INTERPRETED else 64

PARTIALS = 32
"""Partial results that are added at once, each to its own sum; the sums are added at the end."""


def grad_weight(
    grad: Tensor,
    code: Tensor,
    x: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    window: Triple,
    pool_stride: Triple,
    pool_padding: Triple,
    output_size: Triple,
    grad_w: Tensor,
    grad_b: Tensor | None,
    channels_last: bool,
    input_precision: str = "ieee",
    widen: bool = False,
    blocks: Blocks | None = None,
) -> list[Launch]:
    """The launches that write both gradients, that of the bias unless it is None; see `triton_pooled_forward`."""
    out_channels, channels, *kernel = grad_w.shape
    out_channels //= groups
    batch, _, *size_pooled = grad.shape
    size = tuple(size_pooled)
    window_rows = triton.next_power_of_2(math.prod(window))
    columns = channels * math.prod(kernel)
    voxels = batch * math.prod(size) * window_rows
    if blocks is None:
        sides = default_blocks(out_channels, columns, voxels, grad_w.element_size())
        rows = power_of_2(voxels, MIN_DOT_SIDE, LARGEST_VOXELS)
        blocks = Blocks(sides.m, min(sides.n, LARGEST_COLUMNS), rows, warps=8, stages=3)
    block_pooled = max(1, blocks.k // window_rows)
    tile = tile_of(batch, size, block_pooled)
    steps = count_tiles(batch, size, tile)
    programs = ceil_div(out_channels, blocks.m) * ceil_div(columns, blocks.n) * groups
    steps_per_split = min(steps, max(MIN_STEPS, ceil_div(steps * programs, PROGRAMS)))
    splits = ceil_div(steps, steps_per_split)
    results = grad_w.numel() + (0 if grad_b is None else grad_b.numel())
    partials = torch.empty(splits, results, dtype=torch.float32, device=grad_w.device)
    arguments = {
        "grad_ptr": grad,
        "code_ptr": code,
        "x_ptr": x,
        "partials_ptr": partials,
        "batch": batch,
        "steps": steps,
        "steps_per_split": steps_per_split,
        "splits": splits,
        "results": results,
        "size": tuple(x.shape[2:]),
        "size_out": output_size,
        "size_pooled": size,
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
        "HAS_BIAS": grad_b is not None,
        "CHANNELS_LAST": channels_last,
        "LONG": needs_long_offsets(grad, grad_w, x),
        "WIDEN": widen,
        "PRECISION": input_precision,
        "TILE": tile,
        "BLOCK_POOLED": block_pooled,
        "WINDOW_ROWS": window_rows,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
    }
    multiply = Launch(grad_weight_max_pool_kernel, (programs * splits,), arguments, blocks.options)
    block = min(1024, triton.next_power_of_2(results)) if INTERPRETED else 32
    arguments = {
        "partials_ptr": partials,
        "grad_w_ptr": grad_w,
        "grad_b_ptr": grad_w if grad_b is None else grad_b,
        "splits": splits,
        "results": results,
        "weights": grad_w.numel(),
        "HAS_BIAS": grad_b is not None,
        "PARTIALS": PARTIALS,
        "BLOCK": max(MIN_DOT_SIDE, block),
    }
    grid = (ceil_div(results, arguments["BLOCK"]),)
    return [multiply, Launch(add_weight_and_bias_kernel, grid, arguments, {"num_warps": 4})]


@triton.jit
def sums_of_columns(values, ROWS: tl.constexpr):
    """(16, columns), each row the same: the sums of a float32 block over its ROWS rows, by a product with ones."""
    return tl.dot(tl.full((16, ROWS), 1.0, tl.float32), values, input_precision="ieee")


@triton.jit
def grad_weight_max_pool_kernel(
    grad_ptr,
    code_ptr,
    x_ptr,
    partials_ptr,
    batch,
    steps,
    steps_per_split,
    splits,
    results,
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
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LONG: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_POOLED: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    depth, height, width = size
    depth_out, height_out, width_out = size_out
    depth_pooled, height_pooled, width_pooled = size_pooled
    x_n, x_c, x_d, x_h, x_w = dense_strides(depth, height, width, GROUPS * CHANNELS, CHANNELS_LAST, LONG)
    y_n, y_c, y_d, y_h, y_w = dense_strides(
        depth_pooled, height_pooled, width_pooled, GROUPS * OUT_CHANNELS, CHANNELS_LAST, LONG
    )
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    columns: tl.constexpr = taps * CHANNELS
    block_rows: tl.constexpr = BLOCK_POOLED * WINDOW_ROWS
    dtype: tl.constexpr = grad_ptr.dtype.element_ty

    blocks_n: tl.constexpr = (columns + BLOCK_N - 1) // BLOCK_N
    blocks_m: tl.constexpr = (OUT_CHANNELS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    block_n = program % blocks_n
    block_m = program // blocks_n % blocks_m
    group = program // blocks_n // blocks_m % GROUPS
    split = program // blocks_n // blocks_m // GROUPS

    o = block_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    o_valid = o[None, :] < OUT_CHANNELS
    index = block_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    index_valid = index < columns
    tap, c = tap_channel(index, block_n * BLOCK_N, CHANNELS, taps, CHANNELS_LAST, BLOCK_N)
    d_tap, h_tap, w_tap = tap_place(tap, KERNEL, DILATION)
    x_columns = (group * CHANNELS + c) * x_c + (d_tap * x_d + h_tap * x_h + w_tap * x_w)  # (1, N)
    in_bits: tl.constexpr = taps <= 32
    y_columns = (group * OUT_CHANNELS + o[None, :]) * y_c  # (1, M)
    row = tl.arange(0, block_rows)[:, None]  # (K, 1)
    pooled_row = tl.arange(0, BLOCK_POOLED)[:, None]
    offsets = tl.arange(0, WINDOW_ROWS)[None, :, None]

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    of_bias = tl.full((block_rows, BLOCK_M), 0.0, tl.float32)
    first = split * steps_per_split
    for tile in range(first, tl.minimum(first + steps_per_split, steps)):
        n, p, q, r = tile_voxels(tile, pooled_row, depth_pooled, height_pooled, width_pooled, TILE)
        valid = (n < batch) & (p < depth_pooled) & (q < height_pooled) & (r < width_pooled) & o_valid
        place = n.to(tl.int64) * y_n + (p * y_d + q * y_h + r * y_w + y_columns)
        code = tl.load(code_ptr + place, mask=valid, other=255)  # NO_VOXEL
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0)
        chosen = code.to(tl.int32)[:, None, :] == offsets
        grad = tl.where(chosen, grad[:, None, :], 0.0).to(dtype)
        grad = tl.reshape(grad, (block_rows, BLOCK_M))  # (K, M)

        n, p, q, r = tile_voxels(tile, row // WINDOW_ROWS, depth_pooled, height_pooled, width_pooled, TILE)
        d, h, w = window_voxels(row % WINDOW_ROWS, p, q, r, WINDOW, POOL_STRIDE, POOL_PADDING)
        exists = (n < batch) & is_inside(d, 0, depth_out) & is_inside(h, 0, height_out) & is_inside(w, 0, width_out)
        d = d * STRIDE[0] - padding[0]
        h = h * STRIDE[1] - padding[1]
        w = w * STRIDE[2] - padding[2]
        inside = exists
        if in_bits:
            inside = taps_inside(exists, d, h, w, depth, height, width, KERNEL, DILATION)
        read = tap_is_inside(inside, tap, d, h, w, depth, height, width, KERNEL, DILATION, in_bits)
        x_rows = x_ptr + n.to(tl.int64) * x_n + (d * x_d + h * x_h + w * x_w)  # (K, 1)
        x = tl.load(x_rows + x_columns, mask=read & index_valid, other=0.0)  # (K, N)
        if HAS_BIAS:
            of_bias += grad.to(tl.float32)
        if WIDEN:
            grad = grad.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)

    partial = partials_ptr + split.to(tl.int64) * results
    weight_rows = (group * OUT_CHANNELS + o[:, None]).to(tl.int64) * columns
    tl.store(partial + weight_rows + index, total, mask=(o[:, None] < OUT_CHANNELS) & index_valid)
    if HAS_BIAS:
        bias = partial + tl.cast(GROUPS * OUT_CHANNELS, tl.int64) * columns + group * OUT_CHANNELS + o[None, :]
        once = (tl.arange(0, 16)[:, None] + block_n == 0) & o_valid  # row 0 of block 0
        tl.store(tl.broadcast_to(bias, (16, BLOCK_M)), sums_of_columns(of_bias, block_rows), mask=once)


@triton.jit
def add_weight_and_bias_kernel(
    partials_ptr,
    grad_w_ptr,
    grad_b_ptr,
    splits,
    results,
    weights,
    HAS_BIAS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, PARTIALS)[:, None]
    total = tl.full((PARTIALS, BLOCK), 0.0, tl.float32)
    for first in range(0, splits, PARTIALS):
        split = first + row
        place = split.to(tl.int64) * results + index
        total += tl.load(partials_ptr + place, mask=(split < splits) & (index < results), other=0.0)
    total = sums_of_columns(total, PARTIALS).to(grad_w_ptr.dtype.element_ty)
    once = (tl.arange(0, 16)[:, None] == 0) & (index < results)
    index = tl.broadcast_to(index, (16, BLOCK))
    tl.store(grad_w_ptr + index, total, mask=once & (index < weights))
    if HAS_BIAS:
        tl.store(grad_b_ptr + (index - weights), total, mask=once & (index >= weights))
