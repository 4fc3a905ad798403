"""What the three implicit-GEMM kernels share: block sizes, the walk over (tap, channel), a launch as a value.

Implicit GEMM (Chetlur et al. 2014, cuDNN): a pass is a product of two matrices which are never stored;
each block of them is gathered from the tensors when it is needed. One flat loop runs over the summed index.

Activations of more than 2**31 values are ordinary for video autoencoders: such tensors get 64-bit offsets. A row of a
block has an address; what a step adds to it is one number, or one for each summed index. Tensors are addressed by
strides, so both memory layouts are read and written where they are; a block is loaded so that neighbouring threads read
neighbouring values.

Only `tl` builtins are called from kernels: functions of Triton's own library are compiled or interpreted as
TRITON_INTERPRET said when *triton* was imported, ours as it says when this module is.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import Blocks
from .triton_epilogue import NO_EPILOGUE, Epilogue, apply_epilogue

PROGRAMS = 264
"""Programs wanted in all: two for each multiprocessor of the largest Hopper GPU."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter; decided when this module is imported."""

MIN_DOT_SIDE = 16
"""Least extent of each side of `tl.dot`."""

GPU_BLOCKS = {2: (128, 128, 64), 4: (128, 64, 32)}
"""Largest BLOCK_M, BLOCK_N, BLOCK_K by bytes of a value. The first keeps a tensor core fed in 16 bits; 32-bit
operands take twice the shared memory and, in IEEE precision, the registers of ordinary FMA units."""

SMALLER_GPU_BLOCKS = {2: (128, 64, 32), 4: (64, 64, 16)}
"""The same for GPUs before Hopper, some of which have a fifth of its shared memory: three stages take 36 KB at most."""

LARGEST_BLOCKS = dict.fromkeys(GPU_BLOCKS, (1024, 1024, 1024)) if INTERPRETED else GPU_BLOCKS
"""In the interpreter an operation takes a tenth of a millisecond whatever its extent: few and large blocks."""


class Launch(NamedTuple):
    """A kernel with everything it is started with."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    def compile(self) -> None:
        """What the first `run` would compile; tensors need no memory."""
        self.kernel.warmup(**self.arguments, grid=self.grid, **self.options)


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `size`, kept within [least, most]."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


@cache
def _is_smaller_than_hopper() -> bool:
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)


def default_blocks(rows: int, columns: int, summed: int, item_bytes: int) -> Blocks:
    """For a product (rows x summed) (summed x columns).

    A thread has at most 64 sums, or half as many operands where few channels make addresses the larger part.
    """
    largest_m, largest_n, largest_k = (SMALLER_GPU_BLOCKS if _is_smaller_than_hopper() else LARGEST_BLOCKS)[item_bytes]
    m = power_of_2(rows, MIN_DOT_SIDE, largest_m)
    n = power_of_2(columns, MIN_DOT_SIDE, largest_n)
    k = power_of_2(summed, MIN_DOT_SIDE, largest_k)
    return Blocks(m, n, k, warps=8 if m * max(n, k) > 128 * 32 else 4, stages=3)


def weight_matrix(weight: Tensor) -> Tensor:
    """(C_out, taps * C_in / groups), the channel fastest: the weight of channels_last_3d as it lies, else a copy."""
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1)


def weight_strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of (output channel, channel, tap); in either layout the taps of one pair are evenly spaced."""
    _, channels, *taps = weight.shape
    if weight.is_contiguous():
        return channels * math.prod(taps), math.prod(taps), 1
    return channels * math.prod(taps), 1, channels


def offset_dtype(*tensors: Tensor) -> Any:
    """tl.int32 if it can count the values of each tensor, which leaves registers free, else tl.int64."""
    reach = max(sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return tl.int32 if reach < 2**31 else tl.int64


def voxels_adjacent(source: Tensor, channels: int) -> bool:
    """Whether neighbouring threads had better read neighbouring voxels of a block, not neighbouring channels."""
    return source.stride(1) != 1 or channels <= 4


def add_partials(partials: Tensor, total: Tensor, epilogue: Epilogue = NO_EPILOGUE) -> Launch:
    """The launch that adds (splits, values) float32 partial results in order into `total`, of whatever layout."""
    block = 256
    arguments = {
        "partials_ptr": partials,
        "total_ptr": total,
        "splits": partials.shape[0],
        "values": total.numel(),
        **epilogue.arguments(total),
        "TOGETHER": power_of_2(partials.shape[0], 1, 8),
        "BLOCK": block,
    }
    return Launch(add_partials_kernel, (ceil_div(total.numel(), block),), arguments, {"num_warps": 4})


@triton.jit
def add(left, right):
    return left + right


@triton.jit
def add_partials_kernel(
    partials_ptr,
    total_ptr,
    splits,
    values,
    residual_ptr,
    negative_slope,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, splits, TOGETHER):
        split = first + tl.arange(0, TOGETHER)[:, None]
        partials = tl.load(
            partials_ptr + split.to(tl.int64) * values + index[None, :],
            mask=(split < splits) & (index < values)[None, :],
            other=0.0,
        )
        total += tl.reduce(partials, 0, add)
    total = apply_epilogue(total, residual_ptr + index, index < values, negative_slope, HAS_RESIDUAL, ACTIVATION)
    tl.store(total_ptr + index, total.to(total_ptr.dtype.element_ty), mask=index < values)


@triton.jit
def tap_and_channel(step, channels, taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Tap, channel and validity of the BLOCK summed indices of a step, each (BLOCK,) or one scalar tap.

    With many channels a step stays inside one tap. With few, FLAT, (tap, channel) is one index, channel
    fastest, and a step covers several taps.
    """
    lanes = tl.arange(0, BLOCK)
    if FLAT:
        index = step * BLOCK + lanes
        tap = index // channels
        channel = index % channels
        valid = index < taps * channels
    else:
        steps_per_tap = (channels + BLOCK - 1) // BLOCK
        tap = step // steps_per_tap
        channel = step % steps_per_tap * BLOCK + lanes
        valid = channel < channels
    return tap, channel, valid


@triton.jit
def tap_steps(channels, taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """How many steps `tap_and_channel` needs for all taps and channels."""
    return (taps * channels + BLOCK - 1) // BLOCK if FLAT else (channels + BLOCK - 1) // BLOCK * taps


@triton.jit
def split_voxel(voxel, depth, height, width):
    """(sample, d, h, w), int32, of a voxel counted in row-major order over (batch, depth, height, width)."""
    row = voxel // width
    plane = row // height
    n = plane // depth
    return n.to(tl.int32), (plane % depth).to(tl.int32), (row % height).to(tl.int32), (voxel % width).to(tl.int32)


@triton.jit
def is_inside(first, shift, size):
    """Whether first + shift is in [0, size): one comparison, as unsigned numbers."""
    return (first + shift).to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def gather(
    row_pointers,
    shifts,
    first,
    moves,
    size,
    row_valid,
    column_valid,
    FLAT: tl.constexpr,
    ROWS_ADJACENT: tl.constexpr,
):
    """(rows, columns) values at row_pointers[i] + shifts[j], zero where a voxel is outside or either is not valid.

    The voxel of row i and column j is first[i] + moves[j] on each of three axes, in [0, size); if not FLAT, `moves` are
    three numbers for all columns. ROWS_ADJACENT: neighbouring threads read neighbouring rows, else columns.
    """
    d_first, h_first, w_first = first
    d_move, h_move, w_move = moves
    depth, height, width = size
    if ROWS_ADJACENT:
        inside = is_inside(d_first[None, :], d_move[:, None] if FLAT else d_move, depth)
        inside &= is_inside(h_first[None, :], h_move[:, None] if FLAT else h_move, height)
        inside &= is_inside(w_first[None, :], w_move[:, None] if FLAT else w_move, width)
        inside = inside & row_valid[None, :] & column_valid[:, None]
        values = tl.load(row_pointers[None, :] + shifts[:, None], mask=inside, other=0.0).T
    else:
        inside = is_inside(d_first[:, None], d_move[None, :] if FLAT else d_move, depth)
        inside &= is_inside(h_first[:, None], h_move[None, :] if FLAT else h_move, height)
        inside &= is_inside(w_first[:, None], w_move[None, :] if FLAT else w_move, width)
        inside = inside & row_valid[:, None] & column_valid[None, :]
        values = tl.load(row_pointers[:, None] + shifts[None, :], mask=inside, other=0.0)
    return values
