"""Gradient with respect to the weight of depthwise and small-group convolution: every lane sums all taps of a channel.

A lane takes the outputs of one channel in a tile, height x width, and walks along the depth: it loads a plane of the
input once, and multiplies it with the gradients of the outputs that it meets through all taps, which it keeps from
plane to plane. One sum for each tap stays in registers until the end of the program, when the lanes of a channel are
added up.

A program covers a run of (tiles of all samples, part of the depth). The sums of each program are float32 partial
results, which a second kernel adds up in an order that follows from the problem alone. Where a stride along the depth
is in the way, or there are too many taps, a program has the taps of one plane of the kernel.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)
# ruff: noqa: RUF005 (nor does it know tuples with a star)

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_depthwise_tiles as rules
from .triton_common import Launch, ceil_div, power_of_2, weight_strides
from .triton_depthwise_kernel import first_output
from .triton_depthwise_tiles import WARPS, Cut, Triple, gradient_tiles


def grad_weight(
    grad_output: Tensor,
    x: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    grad_w: Tensor,
    cut: Cut | None = None,
) -> list[Launch]:
    """The launches that write the gradient with respect to the weight into grad_w."""
    out_channels, channels, *kernel = grad_w.shape
    apart = tuple(e // math.gcd(s, e) for s, e in zip(stride, dilation, strict=True))
    move = tuple(s // math.gcd(s, e) for s, e in zip(stride, dilation, strict=True))
    size = grad_output.shape[2:]
    channels_last = grad_output.stride(1) == 1 and out_channels > 1
    tile = gradient_tiles(x.shape[0], out_channels, channels, size, kernel, channels_last, move[0] == 1, cut)
    counts = tuple(
        ceil_div(extent, step * count) * step
        for extent, step, count in zip(size, apart, (tile.depth, tile.height, tile.width), strict=True)
    )
    positions = x.shape[0] * counts[1] * counts[2]
    blocks = ceil_div(positions, tile.positions)
    parts = 1 if tile.walk else kernel[0]
    programs = ceil_div(out_channels, tile.channels) * channels * parts
    runs = blocks * counts[0]
    splits = ceil_div(runs, max(1, runs * programs // rules.PROGRAMS))
    weights = grad_w.numel()
    partials = torch.empty(splits, weights, dtype=torch.float32, device=grad_w.device)
    arguments: dict[str, Any] = {
        "grad_output_ptr": grad_output,
        "x_ptr": x,
        "partials_ptr": partials,
        "positions": positions,
        "blocks": blocks,
        "counts": counts,
        "steps": tile.depth,
        "runs_of_split": ceil_div(runs, splits),
        "weights": weights,
        "size": tuple(x.shape[2:]),
        "size_out": tuple(size),
        "padding": padding,
        "grad_output_strides": grad_output.stride()[:4],
        "x_strides": x.stride()[:4],
        "weight_strides": weight_strides(grad_w),
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "SPREAD": dilation,
        "APART": apart,
        "MOVE": move,
        "OUT_CHANNELS": out_channels,
        "CHANNELS": channels,
        "RESULTS": out_channels // groups,
        "X_W": x.stride(4),
        "GRAD_OUTPUT_W": grad_output.stride(4),
        "WALK": kernel[0] if tile.walk else 1,
        "HEIGHT": tile.height,
        "WIDTH": tile.width,
        "POSITIONS": tile.positions,
        "BLOCK_C": tile.channels,
    }
    multiply = Launch(depthwise_grad_weight_kernel, (programs * splits,), arguments, {"num_warps": WARPS})
    block = power_of_2(weights, 1, 32)
    arguments = {
        "partials_ptr": partials,
        "grad_w_ptr": grad_w,
        "splits": splits,
        "weights": weights,
        "ROWS": power_of_2(splits, 1, 64),
        "BLOCK": block,
    }
    add = Launch(add_rows_kernel, (ceil_div(weights, block),), arguments, {"num_warps": WARPS})
    return [multiply, add]


@triton.jit
def plus(one, other):
    return one + other


@triton.jit
def load_gradients(
    plane, h, w, height, width, rows, APART: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr
):
    """A tuple of HEIGHT x WIDTH gradients of each lane."""
    values = ()
    for i in tl.static_range(HEIGHT):
        h_valid = (h + i * APART[1]).to(tl.uint32) < height
        for j in tl.static_range(WIDTH):
            valid = h_valid & ((w + j * APART[2]).to(tl.uint32) < width)
            value = tl.load(plane + i * APART[1] * rows + j * APART[2] * W, mask=valid, other=0.0)
            values = values + (value.to(tl.float32),)
    return values


@triton.jit
def add_products(
    totals,
    gradients,
    plane,
    h_first,
    w_first,
    height,
    width,
    x_h,
    X_W: tl.constexpr,
    SPREAD: tl.constexpr,
    MOVE: tl.constexpr,
    KERNEL: tl.constexpr,
    WALK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`totals`, one tensor for each of WALK x KERNEL[1] x KERNEL[2] taps, plus the products of a plane of the input."""
    # An element of a tuple that was handed on is no constexpr until it has a name.
    TAPS_H: tl.constexpr = KERNEL[1]
    TAPS_W: tl.constexpr = KERNEL[2]
    MOVE_H: tl.constexpr = MOVE[1]
    MOVE_W: tl.constexpr = MOVE[2]
    for row in tl.static_range((HEIGHT - 1) * MOVE_H + TAPS_H):
        h_valid = (h_first + row * SPREAD[1]).to(tl.uint32) < height
        values = ()
        for column in tl.static_range((WIDTH - 1) * MOVE_W + TAPS_W):
            valid = h_valid & ((w_first + column * SPREAD[2]).to(tl.uint32) < width)
            value = tl.load(plane + row * SPREAD[1] * x_h + column * SPREAD[2] * X_W, mask=valid, other=0.0)
            values = values + (value.to(tl.float32),)
        sums = ()
        for d_nth in tl.static_range(WALK):
            for h_nth in tl.static_range(TAPS_H):
                for w_nth in tl.static_range(TAPS_W):
                    total = totals[(d_nth * TAPS_H + h_nth) * TAPS_W + w_nth]
                    for i in tl.static_range(HEIGHT):
                        if row == i * MOVE_H + h_nth:
                            for j in tl.static_range(WIDTH):
                                gradient = gradients[(d_nth * HEIGHT + i) * WIDTH + j]
                                total = tl.fma(gradient, values[j * MOVE_W + w_nth], total)
                    sums = sums + (total,)
        totals = sums
    return totals


@triton.jit
def depthwise_grad_weight_kernel(
    grad_output_ptr,
    x_ptr,
    partials_ptr,
    positions,
    blocks,
    counts,
    steps,
    runs_of_split,
    weights,
    size,
    size_out,
    padding,
    grad_output_strides,
    x_strides,
    weight_strides,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SPREAD: tl.constexpr,
    APART: tl.constexpr,
    MOVE: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,
    X_W: tl.constexpr,
    GRAD_OUTPUT_W: tl.constexpr,
    WALK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    depth, height, width = size
    depth_out, height_out, width_out = size_out
    grad_output_n, grad_output_c, grad_output_d, grad_output_h = grad_output_strides
    x_n, x_c, x_d, x_h = x_strides
    by_output, by_channel, by_tap = weight_strides
    _, h_tiles, w_tiles = counts
    PLANE: tl.constexpr = HEIGHT * WIDTH
    AHEAD: tl.constexpr = WALK - 1
    PARTS: tl.constexpr = KERNEL[0] // WALK

    blocks_c = (OUT_CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    o = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # (C,)
    channel = program // blocks_c % CHANNELS
    part = program // blocks_c // CHANNELS % PARTS
    split = program // blocks_c // CHANNELS // PARTS
    o_column = o[None, :]
    x_columns = x_ptr + (o_column // RESULTS * CHANNELS + channel).to(tl.int64) * x_c
    grad_output_columns = grad_output_ptr + o_column.to(tl.int64) * grad_output_c

    totals = ()
    for _ in tl.static_range(WALK * KERNEL[1] * KERNEL[2]):
        totals = totals + (tl.full((POSITIONS, BLOCK_C), 0.0, tl.float32),)
    for nth in range(0, runs_of_split):
        run = split * runs_of_split + nth
        position = run % blocks * POSITIONS + tl.arange(0, POSITIONS)[:, None]  # (P, 1)
        n = (position // (h_tiles * w_tiles)).to(tl.int64)
        tile = position % (h_tiles * w_tiles)
        d_output = first_output(run // blocks, steps, APART[0])
        h_output = first_output(tile // w_tiles, HEIGHT, APART[1])
        w_output = first_output(tile % w_tiles, WIDTH, APART[2])
        d_first = d_output * STRIDE[0] - padding[0] + part * SPREAD[0]
        w_first = w_output * STRIDE[2] - padding[2]
        x_tiles = (
            x_columns + n * x_n + (h_output * STRIDE[1] - padding[1]).to(tl.int64) * x_h + w_first.to(tl.int64) * X_W
        )
        grad_output_tiles = (
            grad_output_columns
            + n * grad_output_n
            + h_output.to(tl.int64) * grad_output_h
            + w_output.to(tl.int64) * GRAD_OUTPUT_W
        )
        # A row that is far from all others stands for lanes that are none.
        lane_valid = (position < positions) & (o_column < OUT_CHANNELS)
        h_first = tl.where(lane_valid, h_output * STRIDE[1] - padding[1], -(2**30))
        h_output = tl.where(lane_valid, h_output, -(2**30))

        gradients = ()
        for _ in tl.static_range(WALK * PLANE):
            gradients = gradients + (tl.full((POSITIONS, BLOCK_C), 0.0, tl.float32),)
        for step in range(0, steps + AHEAD):
            d_out = d_output + step * APART[0]
            carried = load_gradients(
                grad_output_tiles + tl.cast(d_out, tl.int64) * grad_output_d,
                h_output,
                w_output,
                tl.where((step < steps) & (d_out < depth_out), height_out, 0).to(tl.uint32),
                tl.cast(width_out, tl.uint32),
                tl.cast(grad_output_h, tl.int64),
                APART,
                HEIGHT,
                WIDTH,
                GRAD_OUTPUT_W,
            )
            for item in tl.static_range(AHEAD * PLANE):
                carried = carried + (gradients[item],)
            gradients = carried
            d = d_first + step * (SPREAD[0] * MOVE[0])
            totals = add_products(
                totals,
                gradients,
                x_tiles + tl.cast(d, tl.int64) * x_d,
                h_first,
                w_first,
                tl.where((d >= 0) & (d < depth), height, 0).to(tl.uint32),
                tl.cast(width, tl.uint32),
                tl.cast(x_h, tl.int64),
                X_W,
                SPREAD,
                MOVE,
                KERNEL,
                WALK,
                HEIGHT,
                WIDTH,
            )

    partial = partials_ptr + split.to(tl.int64) * weights + o * by_output + channel * by_channel
    first_tap = part * KERNEL[1] * KERNEL[2]
    for tap in tl.static_range(WALK * KERNEL[1] * KERNEL[2]):
        total = tl.reduce(totals[tap], 0, plus)
        tl.store(partial + (first_tap + tap) * by_tap, total, mask=o < OUT_CHANNELS)


@triton.jit
def add_rows_kernel(partials_ptr, grad_w_ptr, splits, weights, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)[:, None]
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for first in range(0, splits, ROWS):
        total += tl.load(
            partials_ptr + (first + row).to(tl.int64) * weights + index[None, :],
            mask=(first + row < splits) & (index[None, :] < weights),
            other=0.0,
        )
    tl.store(grad_w_ptr + index, tl.reduce(total, 0, plus).to(grad_w_ptr.dtype.element_ty), mask=index < weights)
