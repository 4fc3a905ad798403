"""What the three implicit-GEMM kernels share: block sizes, the walk over (tap, channel), a launch as a value.

Implicit GEMM (Chetlur et al. 2014, cuDNN): a pass is a product of two matrices which are never stored;
each block of them is gathered from the tensors when it is needed. One flat loop runs over the summed index.

Offsets are int64 throughout: activations of more than 2**31 values are ordinary for video autoencoders.
Tensors are addressed by strides, so both memory layouts are read and written where they are.

Only `tl` builtins are called from kernels: functions of Triton's own library are compiled or interpreted as
TRITON_INTERPRET said when *triton* was imported, ours as it says when this module is.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter; decided when this module is imported."""

MIN_DOT_SIDE = 16
"""Least extent of each side of `tl.dot`."""

GPU_BLOCKS = {2: (128, 128, 64), 4: (128, 64, 32)}
"""Largest BLOCK_M, BLOCK_N, BLOCK_K by bytes of a value. The first keeps a tensor core fed in 16 bits; 32-bit
operands take twice the shared memory and, in IEEE precision, the registers of ordinary FMA units."""

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


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `size`, kept within [least, most]."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def block_sizes(rows: int, columns: int, summed: int, item_bytes: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K for a product (rows x summed) (summed x columns)."""
    largest_m, largest_n, largest_k = LARGEST_BLOCKS[item_bytes]
    return {
        "BLOCK_M": power_of_2(rows, MIN_DOT_SIDE, largest_m),
        "BLOCK_N": power_of_2(columns, MIN_DOT_SIDE, largest_n),
        "BLOCK_K": power_of_2(summed, MIN_DOT_SIDE, largest_k),
    }


def launch_options(blocks: dict[str, int]) -> dict[str, int]:
    """Warps by the size of the accumulator (64 values a thread at 128 x 128), three stages of prefetch."""
    return {"num_warps": 8 if blocks["BLOCK_M"] * blocks["BLOCK_N"] > 128 * 64 else 4, "num_stages": 3}


def weight_strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of (output channel, channel, tap); in either layout the taps of one pair are evenly spaced."""
    _, channels, *taps = weight.shape
    if weight.is_contiguous():
        return channels * math.prod(taps), math.prod(taps), 1
    return channels * math.prod(taps), 1, channels


@triton.jit
def tap_and_channel(step, channels, taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Tap, channel and validity of the BLOCK summed indices of a step, each (1, BLOCK) or one scalar tap.

    With many channels a step stays inside one tap. With few, FLAT, (tap, channel) is one index, channel
    fastest, and a step covers several taps.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
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
    return tap, channel.to(tl.int64), valid


@triton.jit
def tap_steps(channels, taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """How many steps `tap_and_channel` needs for all taps and channels."""
    return (taps * channels + BLOCK - 1) // BLOCK if FLAT else (channels + BLOCK - 1) // BLOCK * taps


@triton.jit
def split_voxel(voxel, depth, height, width):
    """(sample, d, h, w) of a voxel counted in row-major order over (batch, depth, height, width)."""
    w = voxel % width
    h = voxel // width % height
    d = voxel // width // height % depth
    n = voxel // width // height // depth
    return n, d, h, w
