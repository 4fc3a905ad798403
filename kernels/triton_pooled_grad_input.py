"""Gradient with respect to the input, behind a max-pool: an implicit GEMM whose left operand is made on the fly.

(voxels of the input) x (input channels), summed over (tap, window, output channel): the output voxel that an input
voxel meets through a tap lies in some windows of the pool, in one where they do not overlap, and got the gradient of
those that chose it, which their codes say. The gradient of what was pooled never exists in memory. Phases of a stride
are those of `triton_grad_input`.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_common import INTERPRETED, MIN_DOT_SIDE, Launch, ceil_div, default_blocks, is_inside
from .triton_grad_input import phase_taps
from .triton_pooled_common import (
    Triple,
    count_tiles,
    dense_strides,
    needs_long_offsets,
    tile_of,
    tile_voxels,
)

FLAT_ALWAYS = INTERPRETED


def grad_input(
    grad: Tensor,
    code: Tensor,
    weight: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    window: Triple,
    pool_stride: Triple,
    pool_padding: Triple,
    output_size: Triple,
    grad_x: Tensor,
    channels_last: bool,
    input_precision: str = "ieee",
    widen: bool = False,
    blocks: Blocks | None = None,
) -> list[Launch]:
    """The launch that writes the gradient with respect to the input into grad_x; see `triton_pooled_forward`."""
    out_channels, channels, *kernel = weight.shape
    out_channels //= groups
    batch, _, *size = grad_x.shape
    # Every phase is launched with as many voxels as the largest, the one of residue 0.
    size_phase = tuple(ceil_div(extent, step) for extent, step in zip(size, stride, strict=True))
    phases = math.prod(stride)
    overlap = tuple(ceil_div(extent, step) for extent, step in zip(window, pool_stride, strict=True))
    # A step of few output channels has several taps and windows; the interpreter has few and large steps.
    flat = out_channels < MIN_DOT_SIDE or FLAT_ALWAYS
    summed = out_channels * math.prod(overlap) * ceil_div(math.prod(kernel), phases) if flat else out_channels
    blocks = blocks or default_blocks(batch * math.prod(size_phase), channels, summed, grad_x.element_size())
    tile = tile_of(batch, size_phase, blocks.m)
    grid = count_tiles(batch, size_phase, tile) * ceil_div(channels, blocks.n) * phases * groups
    arguments = {
        "grad_ptr": grad,
        "code_ptr": code,
        "weight_ptr": weight,
        "grad_x_ptr": grad_x,
        "batch": batch,
        "size": tuple(size),
        "size_phase": size_phase,
        "size_out": output_size,
        "size_pooled": tuple(grad.shape[2:]),
        "padding": padding,
        "GROUPS": groups,
        "CHANNELS": channels,
        "OUT_CHANNELS": out_channels,
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "TAP_STEP": tuple(s // math.gcd(s, e) for s, e in zip(stride, dilation, strict=True)),
        "OUTPUT_STEP": tuple(e // math.gcd(s, e) for s, e in zip(stride, dilation, strict=True)),
        "WINDOW": window,
        "POOL_STRIDE": pool_stride,
        "POOL_PADDING": pool_padding,
        "OVERLAP": overlap,
        "FLAT": flat,
        "CHANNELS_LAST": channels_last,
        "LONG": needs_long_offsets(grad, weight, grad_x),
        "WIDEN": widen,
        "PRECISION": input_precision,
        "TILE": tile,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
    }
    return [Launch(grad_input_max_pool_kernel, (grid,), arguments, blocks.options)]


@triton.jit
def grad_input_max_pool_kernel(
    grad_ptr,
    code_ptr,
    weight_ptr,
    grad_x_ptr,
    batch,
    size,
    size_phase,
    size_out,
    size_pooled,
    padding,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr,
    OUTPUT_STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    OVERLAP: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LONG: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth, height, width = size
    depth_phase, height_phase, width_phase = size_phase
    depth_out, height_out, width_out = size_out
    depth_pooled, height_pooled, width_pooled = size_pooled
    x_n, x_c, x_d, x_h, x_w = dense_strides(depth, height, width, GROUPS * CHANNELS, CHANNELS_LAST, LONG)
    y_n, y_c, y_d, y_h, y_w = dense_strides(
        depth_pooled, height_pooled, width_pooled, GROUPS * OUT_CHANNELS, CHANNELS_LAST, LONG
    )
    taps_in_all: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    weight_o: tl.constexpr = CHANNELS * taps_in_all
    weight_c: tl.constexpr = 1 if CHANNELS_LAST else taps_in_all
    weight_t: tl.constexpr = CHANNELS if CHANNELS_LAST else 1

    blocks_n: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    phases: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
    program = tl.program_id(0)
    block_n = program % blocks_n
    group = program // blocks_n % GROUPS
    phase = program // blocks_n // GROUPS % phases
    tile = program // blocks_n // GROUPS // phases

    d_residue = phase // (STRIDE[1] * STRIDE[2])
    h_residue = phase // STRIDE[2] % STRIDE[1]
    w_residue = phase % STRIDE[2]
    d_tap, d_taps, d_shift = phase_taps(d_residue + padding[0], KERNEL[0], STRIDE[0], DILATION[0], TAP_STEP[0])
    h_tap, h_taps, h_shift = phase_taps(h_residue + padding[1], KERNEL[1], STRIDE[1], DILATION[1], TAP_STEP[1])
    w_tap, w_taps, w_shift = phase_taps(w_residue + padding[2], KERNEL[2], STRIDE[2], DILATION[2], TAP_STEP[2])

    row = tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
    n, d_quotient, h_quotient, w_quotient = tile_voxels(tile, row, depth_phase, height_phase, width_phase, TILE)
    voxel_valid = (n < batch) & (d_quotient < depth_phase) & (h_quotient < height_phase) & (w_quotient < width_phase)
    c = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    lanes = tl.arange(0, BLOCK_K)[None, :]  # (1, K)
    first = n.to(tl.int64) * y_n + group * OUT_CHANNELS * y_c  # (M, 1)
    grad_rows = grad_ptr + first
    code_rows = code_ptr + first
    weight_rows = weight_ptr + tl.cast(group * OUT_CHANNELS, tl.int64) * weight_o + c[:, None] * weight_c  # (N, 1)
    c_valid = c[:, None] < CHANNELS

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    taps = d_taps * h_taps * w_taps
    windows: tl.constexpr = OVERLAP[0] * OVERLAP[1] * OVERLAP[2]
    blocks_k: tl.constexpr = (OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K
    steps = (taps * (windows * OUT_CHANNELS) + BLOCK_K - 1) // BLOCK_K if FLAT else taps * (windows * blocks_k)
    for step in range(0, steps):
        if FLAT:
            index = step * BLOCK_K + lanes
            o = index % OUT_CHANNELS
            before = index // OUT_CHANNELS % windows
            nth = index // (OUT_CHANNELS * windows)
            valid = nth < taps
        else:
            o = step % blocks_k * BLOCK_K + lanes
            before = step // blocks_k % windows
            nth = step // (blocks_k * windows)
            valid = o < OUT_CHANNELS
        d_nth = nth // (h_taps * w_taps)
        h_nth = nth // w_taps % h_taps
        w_nth = nth % w_taps
        # The output voxel counted from the start of the first window, which lies in the padding.
        d_out = d_quotient + (d_shift - d_nth * OUTPUT_STEP[0])
        h_out = h_quotient + (h_shift - h_nth * OUTPUT_STEP[1])
        w_out = w_quotient + (w_shift - w_nth * OUTPUT_STEP[2])
        met = (
            voxel_valid
            & is_inside(d_out, 0, depth_out)
            & is_inside(h_out, 0, height_out)
            & is_inside(w_out, 0, width_out)
        )
        d_out += POOL_PADDING[0]
        h_out += POOL_PADDING[1]
        w_out += POOL_PADDING[2]
        # The last window that starts at or before it, and those before that one.
        p = d_out // POOL_STRIDE[0] - before // (OVERLAP[1] * OVERLAP[2])
        q = h_out // POOL_STRIDE[1] - before // OVERLAP[2] % OVERLAP[1]
        r = w_out // POOL_STRIDE[2] - before % OVERLAP[2]
        d_offset = d_out - p * POOL_STRIDE[0]
        h_offset = h_out - q * POOL_STRIDE[1]
        w_offset = w_out - r * POOL_STRIDE[2]
        met &= is_inside(p, 0, depth_pooled) & is_inside(q, 0, height_pooled) & is_inside(r, 0, width_pooled)
        met &= (d_offset < WINDOW[0]) & (h_offset < WINDOW[1]) & (w_offset < WINDOW[2])
        offset = (d_offset * WINDOW[1] + h_offset) * WINDOW[2] + w_offset
        place = (p * y_d + q * y_h + r * y_w) + o * y_c  # (M, K)
        code = tl.load(code_rows + place, mask=met & valid, other=255)  # NO_VOXEL
        grad = tl.load(grad_rows + place, mask=met & valid, other=0.0)
        grad = tl.where(code.to(tl.int32) == offset, grad, 0.0).to(grad_ptr.dtype.element_ty)
        tap = (d_tap + d_nth * TAP_STEP[0]) * KERNEL[1] + h_tap + h_nth * TAP_STEP[1]
        tap = tap * KERNEL[2] + w_tap + w_nth * TAP_STEP[2]
        weight = tl.load(weight_rows + (o * weight_o + tap * weight_t), mask=c_valid & valid, other=0.0)  # (N, K)
        if WIDEN:
            grad = grad.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(grad, tl.trans(weight), total, input_precision=PRECISION)

    c = c[None, :]
    d = d_quotient * STRIDE[0] + d_residue
    h = h_quotient * STRIDE[1] + h_residue
    w = w_quotient * STRIDE[2] + w_residue
    tl.store(
        grad_x_ptr + n.to(tl.int64) * x_n + (d * x_d + h * x_h + w * x_w) + (group * CHANNELS + c) * x_c,
        total.to(grad_x_ptr.dtype.element_ty),
        mask=voxel_valid & (d < depth) & (h < height) & (w < width) & (c < CHANNELS),
    )
