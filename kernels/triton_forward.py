"""Forward convolution as an implicit GEMM: (voxels of y) x (output channels), summed over (tap, channel)."""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_common import (
    MIN_DOT_SIDE,
    Launch,
    ceil_div,
    default_blocks,
    gather,
    offset_dtype,
    split_voxel,
    tap_and_channel,
    tap_steps,
    voxels_adjacent,
    weight_matrix,
)
from .triton_epilogue import NO_EPILOGUE, Epilogue, apply_epilogue

Triple = tuple[int, int, int]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    y: Tensor,
    input_precision: str = "ieee",
    widen: bool = False,
    blocks: Blocks | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> list[Launch]:
    """The launch that writes the convolution of x with weight, plus bias, into y.

    Args:
        input_precision: how `tl.dot` treats float32 operands, "ieee" or "tf32".
        widen: multiply in float32, for a dtype that `tl.dot` does not take where this runs.
        blocks: how the product is cut up; by default as its sizes suggest.
        epilogue: what follows the bias.
    """
    out_channels, channels, *kernel = weight.shape
    out_channels //= groups
    voxels = y.shape[0] * math.prod(y.shape[2:])
    flat = channels < MIN_DOT_SIDE
    blocks = blocks or default_blocks(
        voxels, out_channels, channels * math.prod(kernel) if flat else channels, y.element_size()
    )
    grid = ceil_div(voxels, blocks.m) * ceil_div(out_channels, blocks.n) * groups
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight_matrix(weight),
        "bias_ptr": weight if bias is None else bias,
        "y_ptr": y,
        "voxels": voxels,
        "channels": channels,
        "out_channels": out_channels,
        "size": tuple(x.shape[2:]),
        "size_out": tuple(y.shape[2:]),
        "padding": padding,
        "x_strides": x.stride(),
        "y_strides": y.stride(),
        **epilogue.arguments(y),
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "HAS_BIAS": bias is not None,
        "OFFSET": offset_dtype(x, y),
        "CHANNELS_LAST": x.stride(1) == 1,
        "VOXELS_ADJACENT": voxels_adjacent(x, channels),
        "FLAT": flat,
        "WIDEN": widen,
        "PRECISION": input_precision,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
    }
    return [Launch(forward_kernel, (grid,), arguments, blocks.options)]


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    voxels,
    channels,
    out_channels,
    size,
    size_out,
    padding,
    x_strides,
    y_strides,
    residual_ptr,
    negative_slope,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    x_n, x_c, x_d, x_h, x_w = x_strides
    y_n, y_c, y_d, y_h, y_w = y_strides
    taps = KERNEL[0] * KERNEL[1] * KERNEL[2]

    # Blocks of output channels follow each other: they read the same voxels.
    blocks_n = (out_channels + BLOCK_N - 1) // BLOCK_N
    blocks_m = (voxels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    block_n = program % blocks_n
    block_m = program // blocks_n % blocks_m
    group = (program // blocks_n // blocks_m).to(OFFSET)

    voxel = block_m.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    n, d, h, w = split_voxel(voxel, depth_out, height_out, width_out)
    d_first = d * STRIDE[0] - padding[0]
    h_first = h * STRIDE[1] - padding[1]
    w_first = w * STRIDE[2] - padding[2]
    voxel_valid = voxel < voxels
    x_rows = n.to(OFFSET) * x_n + d_first.to(OFFSET) * x_d + h_first.to(OFFSET) * x_h
    x_rows = x_ptr + group * channels * x_c + x_rows + w_first.to(OFFSET) * x_w  # (M,)
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    o_valid = o < out_channels
    weight_rows = weight_ptr + (group * out_channels + o) * (channels * taps)  # (N,)

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, tap_steps(channels, taps, BLOCK_K, FLAT)):
        tap, c, c_valid = tap_and_channel(step, channels, taps, BLOCK_K, FLAT)  # (K,)
        d_shift = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        h_shift = tap // KERNEL[2] % KERNEL[1] * DILATION[1]
        w_shift = tap % KERNEL[2] * DILATION[2]
        x_shift = d_shift.to(OFFSET) * x_d + h_shift.to(OFFSET) * x_h + w_shift.to(OFFSET) * x_w
        x_shift = x_shift + c.to(OFFSET) * x_c  # (K,)
        first, shift = (d_first, h_first, w_first), (d_shift, h_shift, w_shift)
        x = gather(x_rows, x_shift, first, shift, size, voxel_valid, c_valid, FLAT, VOXELS_ADJACENT)  # (M, K)
        weight = tl.load(
            weight_rows[:, None] + (tap * channels + c)[None, :], mask=o_valid[:, None] & c_valid[None, :], other=0.0
        )
        if WIDEN:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, weight.T, total, input_precision=PRECISION)

    if HAS_BIAS:
        total += tl.load(bias_ptr + group * out_channels + o, mask=o_valid, other=0.0).to(tl.float32)[None, :]
    y_rows = n.to(OFFSET) * y_n + d.to(OFFSET) * y_d + h.to(OFFSET) * y_h + w.to(OFFSET) * y_w
    y_columns = (group * out_channels + o) * y_c
    if CHANNELS_LAST:
        place = y_rows[:, None] + y_columns[None, :]
        valid = voxel_valid[:, None] & o_valid[None, :]
    else:
        place = y_rows[None, :] + y_columns[:, None]
        valid = voxel_valid[None, :] & o_valid[:, None]
        total = total.T
    total = apply_epilogue(total, residual_ptr + place, valid, negative_slope, HAS_RESIDUAL, ACTIVATION)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=valid)
