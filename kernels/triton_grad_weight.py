"""Gradient with respect to the weight as an implicit GEMM: (output channels) x (tap, channel), over voxels.

The result is small and the sum long, so the sum is split (split-K): each program adds up one run of voxels
and writes a float32 partial result; a second kernel adds the partials in order. How the sum is split follows
from the problem alone, never from the device, so the bits are the same at every run.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_common import (
    MIN_DOT_SIDE,
    PROGRAMS,
    Launch,
    add_partials,
    ceil_div,
    default_blocks,
    gather,
    offset_dtype,
    split_voxel,
    tap_and_channel,
    tap_steps,
    voxels_adjacent,
    weight_strides,
)

Triple = tuple[int, int, int]

MIN_STEPS = 8
"""Least blocks of voxels in one partial sum; below, writing the partials costs more than it gains."""


def grad_weight(
    grad_output: Tensor,
    x: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    grad_w: Tensor,
    input_precision: str = "ieee",
    widen: bool = False,
    blocks: Blocks | None = None,
) -> list[Launch]:
    """The launches that write the gradient with respect to the weight into grad_w; see `forward` for the rest."""
    out_channels, channels, *kernel = grad_w.shape
    out_channels //= groups
    taps = math.prod(kernel)
    voxels = grad_output.shape[0] * math.prod(grad_output.shape[2:])
    flat = channels < MIN_DOT_SIDE
    columns, repeats = (channels * taps, 1) if flat else (channels, taps)
    blocks = blocks or default_blocks(out_channels, columns, voxels, grad_w.element_size())
    blocks_n = ceil_div(columns, blocks.n) * repeats
    programs = ceil_div(out_channels, blocks.m) * blocks_n * groups
    steps = ceil_div(voxels, blocks.k)
    steps_per_split = min(steps, max(MIN_STEPS, ceil_div(steps * programs, PROGRAMS)))
    splits = ceil_div(steps, steps_per_split)
    partials = torch.empty(splits, grad_w.numel(), dtype=torch.float32, device=grad_w.device)
    arguments = {
        "grad_output_ptr": grad_output,
        "x_ptr": x,
        "partials_ptr": partials,
        "voxels": voxels,
        "steps_per_split": steps_per_split,
        "splits": splits,
        "weights": grad_w.numel(),
        "channels": channels,
        "out_channels": out_channels,
        "size": tuple(x.shape[2:]),
        "size_out": tuple(grad_output.shape[2:]),
        "padding": padding,
        "grad_output_strides": grad_output.stride(),
        "x_strides": x.stride(),
        "weight_strides": weight_strides(grad_w),
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "OFFSET": offset_dtype(grad_output, x),
        "CHANNELS_LAST": x.stride(1) == 1,
        "VOXELS_ADJACENT": voxels_adjacent(x, channels),
        "FLAT": flat,
        "WIDEN": widen,
        "PRECISION": input_precision,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
    }
    multiply = Launch(grad_weight_kernel, (programs * splits,), arguments, blocks.options)
    return [multiply, add_partials(partials, grad_w)]


@triton.jit
def grad_weight_kernel(
    grad_output_ptr,
    x_ptr,
    partials_ptr,
    voxels,
    steps_per_split,
    splits,
    weights,
    channels,
    out_channels,
    size,
    size_out,
    padding,
    grad_output_strides,
    x_strides,
    weight_strides,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VOXELS_ADJACENT: tl.constexpr,
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth_out, height_out, width_out = size_out
    grad_output_n, grad_output_c, grad_output_d, grad_output_h, grad_output_w = grad_output_strides
    x_n, x_c, x_d, x_h, x_w = x_strides
    weight_o, weight_c, weight_t = weight_strides

    taps = KERNEL[0] * KERNEL[1] * KERNEL[2]
    blocks_n = tap_steps(channels, taps, BLOCK_N, FLAT)
    blocks_m = (out_channels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    block_n = program % blocks_n
    block_m = program // blocks_n % blocks_m
    split = program // blocks_n // blocks_m % splits
    group = (program // blocks_n // blocks_m // splits).to(OFFSET)

    o = block_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    o_valid = o < out_channels
    tap, c, c_valid = tap_and_channel(block_n, channels, taps, BLOCK_N, FLAT)  # (N,)
    d_shift = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0] - padding[0]
    h_shift = tap // KERNEL[2] % KERNEL[1] * DILATION[1] - padding[1]
    w_shift = tap % KERNEL[2] * DILATION[2] - padding[2]
    grad_output_shift = (group * out_channels + o) * grad_output_c  # (M,)
    x_shift = d_shift.to(OFFSET) * x_d + h_shift.to(OFFSET) * x_h + w_shift.to(OFFSET) * x_w
    x_shift = x_shift + (group * channels + c) * x_c  # (N,)

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    first_step = split * steps_per_split
    for step in range(0, steps_per_split):
        voxel = (first_step + step).to(OFFSET) * BLOCK_K + tl.arange(0, BLOCK_K)
        voxel_valid = voxel < voxels  # (K,)
        n, d, h, w = split_voxel(voxel, depth_out, height_out, width_out)
        grad_output_rows = n.to(OFFSET) * grad_output_n + d.to(OFFSET) * grad_output_d
        grad_output_rows += h.to(OFFSET) * grad_output_h + w.to(OFFSET) * grad_output_w
        d_first = d * STRIDE[0]
        h_first = h * STRIDE[1]
        w_first = w * STRIDE[2]
        x_rows = n.to(OFFSET) * x_n + d_first.to(OFFSET) * x_d + h_first.to(OFFSET) * x_h
        x_rows += w_first.to(OFFSET) * x_w
        if CHANNELS_LAST:
            grad_output = tl.load(
                grad_output_ptr + grad_output_rows[:, None] + grad_output_shift[None, :],
                mask=voxel_valid[:, None] & o_valid[None, :],
                other=0.0,
            ).T
        else:
            grad_output = tl.load(
                grad_output_ptr + grad_output_rows[None, :] + grad_output_shift[:, None],
                mask=voxel_valid[None, :] & o_valid[:, None],
                other=0.0,
            )
        first, shift = (d_first, h_first, w_first), (d_shift, h_shift, w_shift)
        x = gather(x_ptr + x_rows, x_shift, first, shift, size, voxel_valid, c_valid, FLAT, VOXELS_ADJACENT)  # (K, N)
        if WIDEN:
            grad_output = grad_output.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(grad_output, x, total, input_precision=PRECISION)

    partial = partials_ptr + split.to(tl.int64) * weights
    partial_rows = (group * out_channels + o) * weight_o
    partial_columns = c * weight_c + tap * weight_t
    tl.store(
        partial + partial_rows[:, None] + partial_columns[None, :], total, mask=o_valid[:, None] & c_valid[None, :]
    )
