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

from .triton_common import (
    MIN_DOT_SIDE,
    Launch,
    block_sizes,
    ceil_div,
    launch_options,
    split_voxel,
    tap_and_channel,
    tap_steps,
    weight_strides,
)

Triple = tuple[int, int, int]

PROGRAMS = 264
"""Programs wanted in all: two for each multiprocessor of the largest Hopper GPU."""

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
) -> tuple[Launch, Launch]:
    """The launches that write the gradient with respect to the weight into grad_w; see `forward` for the rest."""
    out_channels, channels, *kernel = grad_w.shape
    out_channels //= groups
    taps = math.prod(kernel)
    voxels = grad_output.shape[0] * math.prod(grad_output.shape[2:])
    flat = channels < MIN_DOT_SIDE
    columns, repeats = (channels * taps, 1) if flat else (channels, taps)
    blocks = block_sizes(out_channels, columns, voxels, grad_w.element_size())
    blocks_n = ceil_div(columns, blocks["BLOCK_N"]) * repeats
    programs = ceil_div(out_channels, blocks["BLOCK_M"]) * blocks_n * groups
    steps = ceil_div(voxels, blocks["BLOCK_K"])
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
        "FLAT": flat,
        "WIDEN": widen,
        "PRECISION": input_precision,
        **blocks,
    }
    multiply = Launch(grad_weight_kernel, (programs * splits,), arguments, launch_options(blocks))
    block = 256
    arguments = {
        "partials_ptr": partials,
        "grad_w_ptr": grad_w,
        "splits": splits,
        "weights": grad_w.numel(),
        "BLOCK": block,
    }
    add = Launch(add_partials_kernel, (ceil_div(grad_w.numel(), block),), arguments, {"num_warps": 4})
    return multiply, add


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
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth, height, width = size
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
    group = (program // blocks_n // blocks_m // splits).to(tl.int64)

    o = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (M,)
    tap, c, c_valid = tap_and_channel(block_n, channels, taps, BLOCK_N, FLAT)  # (1, N)
    d_first = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0] - padding[0]
    h_first = tap // KERNEL[2] % KERNEL[1] * DILATION[1] - padding[1]
    w_first = tap % KERNEL[2] * DILATION[2] - padding[2]
    grad_output_columns = grad_output_ptr + (group * out_channels + o[None, :]) * grad_output_c  # (1, M)
    x_columns = x_ptr + (group * channels + c) * x_c  # (1, N)

    o_valid = o[None, :] < out_channels

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    first_voxel = split.to(tl.int64) * steps_per_split * BLOCK_K
    for step in range(0, steps_per_split):
        voxel = first_voxel + step * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]  # (K, 1)
        voxel_valid = voxel < voxels
        n, d, h, w = split_voxel(voxel, depth_out, height_out, width_out)
        grad_output = tl.load(
            grad_output_columns + n * grad_output_n + d * grad_output_d + h * grad_output_h + w * grad_output_w,
            mask=voxel_valid & o_valid,
            other=0.0,
        )  # (K, M)
        d_in = d * STRIDE[0] + d_first
        h_in = h * STRIDE[1] + h_first
        w_in = w * STRIDE[2] + w_first
        inside = (d_in >= 0) & (d_in < depth) & (h_in >= 0) & (h_in < height) & (w_in >= 0) & (w_in < width)
        x = tl.load(
            x_columns + n * x_n + d_in * x_d + h_in * x_h + w_in * x_w,
            mask=inside & voxel_valid & c_valid,
            other=0.0,
        )  # (K, N)
        if WIDEN:
            grad_output = grad_output.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(tl.trans(grad_output), x, total, input_precision=PRECISION)

    o = o[:, None]
    partial = partials_ptr + split.to(tl.int64) * weights
    tl.store(
        partial + (group * out_channels + o) * weight_o + c * weight_c + tap * weight_t,
        total,
        mask=(o < out_channels) & c_valid,
    )


@triton.jit
def add_partials_kernel(partials_ptr, grad_w_ptr, splits, weights, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for split in range(0, splits):
        total += tl.load(partials_ptr + tl.cast(split, tl.int64) * weights + index, mask=index < weights, other=0.0)
    tl.store(grad_w_ptr + index, total.to(grad_w_ptr.dtype.element_ty), mask=index < weights)
