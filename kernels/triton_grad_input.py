"""Gradient with respect to the input as an implicit GEMM that gathers: no atomics, no zeros between strides.

Along one axis, with stride s, padding p, dilation e and g = gcd(s, e), input voxel u = r + s * q meets output
voxel t through tap a when  u + p = s * t + e * a.  For a residue r the taps that give a whole t are
a = a_0 + (s / g) * b  with a_0 the first one, and  t = q + (r + p - e * a_0) / s - (e / g) * b.

The voxels of one residue per axis are a phase. A program computes a block of voxels of one phase, so all of
them meet the same taps: (voxels of the phase) x (input channels), summed over (taps of the phase, output
channel).
"""

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

Triple = tuple[int, int, int]


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    grad_x: Tensor,
    input_precision: str = "ieee",
    widen: bool = False,
    blocks: Blocks | None = None,
) -> list[Launch]:
    """The launch that writes the gradient with respect to the input into grad_x; see `forward` for the rest."""
    out_channels, channels, *kernel = weight.shape
    out_channels //= groups
    # Every phase is launched with as many voxels as the largest, the one of residue 0.
    size_phase = tuple(ceil_div(size, step) for size, step in zip(grad_x.shape[2:], stride, strict=True))
    voxels = grad_x.shape[0] * math.prod(size_phase)
    phases = math.prod(stride)
    flat = out_channels < MIN_DOT_SIDE
    summed = out_channels * ceil_div(math.prod(kernel), phases) if flat else out_channels
    blocks = blocks or default_blocks(voxels, channels, summed, grad_x.element_size())
    grid = ceil_div(voxels, blocks.m) * ceil_div(channels, blocks.n) * phases * groups
    arguments = {
        "grad_output_ptr": grad_output,
        "weight_ptr": weight_matrix(weight),
        "grad_x_ptr": grad_x,
        "voxels": voxels,
        "channels": channels,
        "out_channels": out_channels,
        "size": tuple(grad_x.shape[2:]),
        "size_phase": size_phase,
        "size_out": tuple(grad_output.shape[2:]),
        "padding": padding,
        "grad_output_strides": grad_output.stride(),
        "grad_x_strides": grad_x.stride(),
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "TAP_STEP": tuple(s // math.gcd(s, e) for s, e in zip(stride, dilation, strict=True)),
        "OUTPUT_STEP": tuple(e // math.gcd(s, e) for s, e in zip(stride, dilation, strict=True)),
        "OFFSET": offset_dtype(grad_output, grad_x),
        "CHANNELS_LAST": grad_x.stride(1) == 1,
        "VOXELS_ADJACENT": voxels_adjacent(grad_output, out_channels),
        "FLAT": flat,
        "WIDEN": widen,
        "PRECISION": input_precision,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
    }
    return [Launch(grad_input_kernel, (grid,), arguments, blocks.options)]


@triton.jit
def phase_taps(offset, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAP_STEP: tl.constexpr):
    """(first tap, number of taps, output voxel of the first tap less q) of the phase with r + p = offset."""
    first = offset * 0 + KERNEL
    for candidate in tl.static_range(TAP_STEP):
        if candidate < KERNEL:
            leads = (offset - candidate * DILATION) % STRIDE == 0
            first = tl.where(leads, candidate, first)
    count = (KERNEL - first + TAP_STEP - 1) // TAP_STEP
    return first, count, (offset - first * DILATION) // STRIDE


@triton.jit
def grad_input_kernel(
    grad_output_ptr,
    weight_ptr,
    grad_x_ptr,
    voxels,
    channels,
    out_channels,
    size,
    size_phase,
    size_out,
    padding,
    grad_output_strides,
    grad_x_strides,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr,
    OUTPUT_STEP: tl.constexpr,
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
    depth, height, width = size
    depth_phase, height_phase, width_phase = size_phase
    grad_output_n, grad_output_c, grad_output_d, grad_output_h, grad_output_w = grad_output_strides
    grad_x_n, grad_x_c, grad_x_d, grad_x_h, grad_x_w = grad_x_strides

    blocks_n = (channels + BLOCK_N - 1) // BLOCK_N
    blocks_m = (voxels + BLOCK_M - 1) // BLOCK_M
    phases = STRIDE[0] * STRIDE[1] * STRIDE[2]
    all_taps = KERNEL[0] * KERNEL[1] * KERNEL[2]
    program = tl.program_id(0)
    block_n = program % blocks_n
    block_m = program // blocks_n % blocks_m
    phase = program // blocks_n // blocks_m % phases
    group = (program // blocks_n // blocks_m // phases).to(OFFSET)

    d_residue = phase // (STRIDE[1] * STRIDE[2])
    h_residue = phase // STRIDE[2] % STRIDE[1]
    w_residue = phase % STRIDE[2]
    d_tap, d_taps, d_shift = phase_taps(d_residue + padding[0], KERNEL[0], STRIDE[0], DILATION[0], TAP_STEP[0])
    h_tap, h_taps, h_shift = phase_taps(h_residue + padding[1], KERNEL[1], STRIDE[1], DILATION[1], TAP_STEP[1])
    w_tap, w_taps, w_shift = phase_taps(w_residue + padding[2], KERNEL[2], STRIDE[2], DILATION[2], TAP_STEP[2])

    # Voxels are counted inside the phase.
    voxel = block_m.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    n, d_quotient, h_quotient, w_quotient = split_voxel(voxel, depth_phase, height_phase, width_phase)
    voxel_valid = voxel < voxels
    d_first = d_quotient + d_shift
    h_first = h_quotient + h_shift
    w_first = w_quotient + w_shift
    grad_output_rows = n.to(OFFSET) * grad_output_n + d_first.to(OFFSET) * grad_output_d
    grad_output_rows += h_first.to(OFFSET) * grad_output_h + w_first.to(OFFSET) * grad_output_w
    grad_output_rows = grad_output_ptr + group * out_channels * grad_output_c + grad_output_rows  # (M,)
    c = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    c_valid = c < channels
    weight_columns = weight_ptr + group * out_channels * (channels * all_taps) + c  # (N,)

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    taps = d_taps * h_taps * w_taps
    for step in range(0, tap_steps(out_channels, taps, BLOCK_K, FLAT)):
        nth, o, o_valid = tap_and_channel(step, out_channels, taps, BLOCK_K, FLAT)  # (K,)
        d_nth = nth // (h_taps * w_taps)
        h_nth = nth // w_taps % h_taps
        w_nth = nth % w_taps
        d_back = d_nth * -OUTPUT_STEP[0]
        h_back = h_nth * -OUTPUT_STEP[1]
        w_back = w_nth * -OUTPUT_STEP[2]
        back = d_back.to(OFFSET) * grad_output_d + h_back.to(OFFSET) * grad_output_h
        back = back + w_back.to(OFFSET) * grad_output_w + o.to(OFFSET) * grad_output_c  # (K,)
        first, moves = (d_first, h_first, w_first), (d_back, h_back, w_back)
        grad_output = gather(
            grad_output_rows, back, first, moves, size_out, voxel_valid, o_valid, FLAT, VOXELS_ADJACENT
        )  # (M, K)
        tap = (d_tap + d_nth * TAP_STEP[0]) * KERNEL[1] + h_tap + h_nth * TAP_STEP[1]
        tap = tap * KERNEL[2] + w_tap + w_nth * TAP_STEP[2]
        weight_shift = o.to(OFFSET) * (channels * all_taps) + tap * channels  # (K,)
        weight = tl.load(
            weight_columns[None, :] + weight_shift[:, None], mask=o_valid[:, None] & c_valid[None, :], other=0.0
        )
        if WIDEN:
            grad_output = grad_output.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(grad_output, weight, total, input_precision=PRECISION)

    d = d_quotient * STRIDE[0] + d_residue
    h = h_quotient * STRIDE[1] + h_residue
    w = w_quotient * STRIDE[2] + w_residue
    valid = voxel_valid & (d < depth) & (h < height) & (w < width)
    grad_x_rows = n.to(OFFSET) * grad_x_n + d.to(OFFSET) * grad_x_d + h.to(OFFSET) * grad_x_h
    grad_x_rows = grad_x_ptr + grad_x_rows + w.to(OFFSET) * grad_x_w
    grad_x_columns = (group * channels + c) * grad_x_c
    total = total.to(grad_x_ptr.dtype.element_ty)
    if CHANNELS_LAST:
        tl.store(grad_x_rows[:, None] + grad_x_columns[None, :], total, mask=valid[:, None] & c_valid[None, :])
    else:
        tl.store(grad_x_rows[None, :] + grad_x_columns[:, None], total.T, mask=valid[None, :] & c_valid[:, None])
