"""Forward convolution as an implicit GEMM: (voxels of y) x (output channels), summed over (tap, channel)."""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

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
) -> Launch:
    """The launch that writes the convolution of x with weight, plus bias, into y.

    Args:
        input_precision: how `tl.dot` treats float32 operands, "ieee" or "tf32".
        widen: multiply in float32, for a dtype that `tl.dot` does not take where this runs.
    """
    out_channels, channels, *kernel = weight.shape
    out_channels //= groups
    voxels = y.shape[0] * math.prod(y.shape[2:])
    flat = channels < MIN_DOT_SIDE
    blocks = block_sizes(voxels, out_channels, channels * math.prod(kernel) if flat else channels, y.element_size())
    grid = ceil_div(voxels, blocks["BLOCK_M"]) * ceil_div(out_channels, blocks["BLOCK_N"]) * groups
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": weight if bias is None else bias,
        "y_ptr": y,
        "voxels": voxels,
        "channels": channels,
        "out_channels": out_channels,
        "size": tuple(x.shape[2:]),
        "size_out": tuple(y.shape[2:]),
        "padding": padding,
        "x_strides": x.stride(),
        "weight_strides": weight_strides(weight),
        "y_strides": y.stride(),
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "HAS_BIAS": bias is not None,
        "FLAT": flat,
        "WIDEN": widen,
        "PRECISION": input_precision,
        **blocks,
    }
    return Launch(forward_kernel, (grid,), arguments, launch_options(blocks))


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
    weight_strides,
    y_strides,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth, height, width = size
    depth_out, height_out, width_out = size_out
    x_n, x_c, x_d, x_h, x_w = x_strides
    weight_o, weight_c, weight_t = weight_strides
    y_n, y_c, y_d, y_h, y_w = y_strides

    # Blocks of output channels follow each other: they read the same voxels.
    blocks_n = (out_channels + BLOCK_N - 1) // BLOCK_N
    blocks_m = (voxels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    block_n = program % blocks_n
    block_m = program // blocks_n % blocks_m
    group = (program // blocks_n // blocks_m).to(tl.int64)

    voxel = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
    n, d, h, w = split_voxel(voxel, depth_out, height_out, width_out)
    d_first = d * STRIDE[0] - padding[0]
    h_first = h * STRIDE[1] - padding[1]
    w_first = w * STRIDE[2] - padding[2]
    o = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # (N,)
    x_rows = x_ptr + n * x_n + group * channels * x_c  # (M, 1)
    weight_rows = weight_ptr + (group * out_channels + o[:, None]) * weight_o  # (N, 1)

    voxel_valid = voxel < voxels
    o_valid = o[:, None] < out_channels

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    taps = KERNEL[0] * KERNEL[1] * KERNEL[2]
    for step in range(0, tap_steps(channels, taps, BLOCK_K, FLAT)):
        tap, c, c_valid = tap_and_channel(step, channels, taps, BLOCK_K, FLAT)  # (1, K)
        d_in = d_first + tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        h_in = h_first + tap // KERNEL[2] % KERNEL[1] * DILATION[1]
        w_in = w_first + tap % KERNEL[2] * DILATION[2]
        inside = (d_in >= 0) & (d_in < depth) & (h_in >= 0) & (h_in < height) & (w_in >= 0) & (w_in < width)
        x = tl.load(
            x_rows + d_in * x_d + h_in * x_h + w_in * x_w + c * x_c,
            mask=inside & voxel_valid & c_valid,
            other=0.0,
        )  # (M, K)
        weight = tl.load(weight_rows + c * weight_c + tap * weight_t, mask=o_valid & c_valid, other=0.0)  # (N, K)
        if WIDEN:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)

    o = o[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + group * out_channels + o, mask=o < out_channels, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + n * y_n + d * y_d + h * y_h + w * y_w + (group * out_channels + o) * y_c,
        total.to(y_ptr.dtype.element_ty),
        mask=voxel_valid & (o < out_channels),
    )
