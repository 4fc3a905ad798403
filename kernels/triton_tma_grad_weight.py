"""grad_weight of stride 1 as an implicit GEMM whose operands the tensor memory accelerator (TMA) fetches.

(output channels) x (input channels) of one tap, summed over voxels, a box of them at a step: the box of the gradient
and that of the input, shifted by the tap, are one TMA copy each, which puts zeros where a box hangs over an end.
The sum is split (split-K) into runs of boxes, and a second kernel adds the float32 partial results in order. How it is
split follows from the problem alone, never from the device, so the bits are the same at every run.

Triton keeps both operands in shared memory, where the matrix units read them, if a box is a run along the width; a box
of several rows of the gradient goes through registers.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_common import PROGRAMS, Launch, add_partials, ceil_div, weight_strides
from .triton_tma import box_of, described, is_channels_last

Triple = tuple[int, int, int]


def grad_weight(
    grad_output: Tensor,
    x: Tensor,
    padding: Triple,
    dilation: Triple,
    grad_w: Tensor,
    blocks: Blocks,
    splits: int = 0,
    input_precision: str = "ieee",
    widen: bool = False,
) -> list[Launch]:
    """The launches that write the gradient with respect to the weight into grad_w; stride 1, one group.

    Args:
        grad_output, x: both contiguous or both channels_last_3d; what is dense in multiples of 16 bytes.
        splits: of the sum over voxels; 0 for as many as keep a large GPU busy.
    """
    out_channels, channels, *kernel = grad_w.shape
    size = tuple(grad_output.shape[2:])
    if is_channels_last(x):
        box = box_of(size, blocks.k)
        order = (0, 2, 3, 4, 1)
        shapes = [1, *box, blocks.m], [1, *box, blocks.n]
    else:
        box = (1, 1, blocks.k)
        order = (0, 2, 3, 1, 4)
        shapes = [1, 1, 1, blocks.m, blocks.k], [1, 1, 1, blocks.n, blocks.k]
    tiles = tuple(ceil_div(extent, side) for extent, side in zip(size, box, strict=True))
    programs = ceil_div(out_channels, blocks.m) * ceil_div(channels, blocks.n) * math.prod(kernel)
    splits = min(x.shape[0] * math.prod(tiles), splits or max(1, PROGRAMS // programs))
    partials = torch.empty(splits, grad_w.numel(), dtype=torch.float32, device=grad_w.device)
    arguments = {
        "grad_output_desc": described(grad_output, order, shapes[0]),
        "x_desc": described(x, order, shapes[1]),
        "partials_ptr": partials,
        "weights": grad_w.numel(),
        "channels": channels,
        "out_channels": out_channels,
        "batch": x.shape[0],
        "depth": x.shape[2],
        "tiles": tiles,
        "padding": padding,
        "dilation": dilation,
        "splits": splits,
        "weight_strides": weight_strides(grad_w),
        "KERNEL": tuple(kernel),
        "BOX": box,
        "CHANNELS_LAST": is_channels_last(x),
        "WIDEN": widen,
        "PRECISION": input_precision,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
    }
    multiply = Launch(tma_grad_weight_kernel, (programs * splits,), arguments, blocks.options)
    return [multiply, add_partials(partials, grad_w)]


@triton.jit
def tma_grad_weight_kernel(
    grad_output_desc,
    x_desc,
    partials_ptr,
    weights,
    channels,
    out_channels,
    batch,
    depth,
    tiles,
    padding,
    dilation,
    splits,
    weight_strides,
    KERNEL: tl.constexpr,
    BOX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_d, tiles_h, tiles_w = tiles
    weight_o, weight_c, weight_t = weight_strides
    BLOCK_K: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]

    # Taps follow each other: they read the same boxes of the gradient, and nearly the same of the input.
    blocks_m = (out_channels + BLOCK_M - 1) // BLOCK_M
    blocks_n = (channels + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tap = program % TAPS
    o = program // TAPS % blocks_m * BLOCK_M
    c = program // TAPS // blocks_m % blocks_n * BLOCK_N
    split = program // TAPS // blocks_m // blocks_n
    d_shift = tap // (KERNEL[1] * KERNEL[2]) * dilation[0] - padding[0]
    h_shift = tap // KERNEL[2] % KERNEL[1] * dilation[1] - padding[1]
    w_shift = tap % KERNEL[2] * dilation[2] - padding[2]

    # Boxes that the shift moves wholly above or below the input are left out: d_begin to d_end are the others.
    d_begin = tl.maximum(0, (-d_shift) // BOX[0])
    d_end = tl.minimum(tiles_d, (depth - d_shift + BOX[0] - 1) // BOX[0])
    planes = tl.maximum(0, d_end - d_begin)
    steps = batch * planes * tiles_h * tiles_w
    steps_per_split = (steps + splits - 1) // splits
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, steps)
    row = begin // tiles_w
    plane = row // tiles_h
    w = begin % tiles_w * BOX[2]
    h = row % tiles_h * BOX[1]
    d = (d_begin + plane % tl.maximum(planes, 1)) * BOX[0]
    n = plane // tl.maximum(planes, 1)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for _ in range(begin, end):
        d_in = d + d_shift
        h_in = h + h_shift
        w_in = w + w_shift
        if CHANNELS_LAST:
            grad_output = grad_output_desc.load([n, d, h, w, o]).reshape(BLOCK_K, BLOCK_M).T
            x = x_desc.load([n, d_in, h_in, w_in, c]).reshape(BLOCK_K, BLOCK_N)
        else:
            grad_output = grad_output_desc.load([n, d, h, o, w]).reshape(BLOCK_M, BLOCK_K)
            x = x_desc.load([n, d_in, h_in, c, w_in]).reshape(BLOCK_N, BLOCK_K).T
        if WIDEN:
            grad_output = grad_output.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(grad_output, x, total, input_precision=PRECISION)
        # Without a branch: Triton fetches ahead only what it can move across steps.
        w += BOX[2]
        h += tl.where(w >= tiles_w * BOX[2], BOX[1], 0)
        w = tl.where(w >= tiles_w * BOX[2], 0, w)
        d += tl.where(h >= tiles_h * BOX[1], BOX[0], 0)
        h = tl.where(h >= tiles_h * BOX[1], 0, h)
        n += (d >= d_end * BOX[0]).to(tl.int32)
        d = tl.where(d >= d_end * BOX[0], d_begin * BOX[0], d)

    o_row = o + tl.arange(0, BLOCK_M)
    c_column = c + tl.arange(0, BLOCK_N)
    partial = partials_ptr + split.to(tl.int64) * weights + tap * weight_t
    tl.store(
        partial + (o_row * weight_o)[:, None] + (c_column * weight_c)[None, :],
        total,
        mask=(o_row < out_channels)[:, None] & (c_column < channels)[None, :],
    )
