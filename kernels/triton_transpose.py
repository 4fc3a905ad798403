"""A dense ncdhw tensor copied into ndhwc, a square of (channels) x (voxels) at a time: the pace of a plain copy."""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INTERPRETED, Launch, ceil_div, power_of_2

MOST_CHANNELS, VOXELS = (1024, 1024) if INTERPRETED else (64, 128)


def channels_last(tensor: Tensor) -> tuple[Tensor, Launch]:
    """An uninitialised channels_last_3d tensor, and the launch that fills it with what is in a contiguous one."""
    batch, channels, *size = tensor.shape
    voxels = math.prod(size)
    target = torch.empty_like(tensor, memory_format=torch.channels_last_3d)
    block_c = power_of_2(channels, 16, MOST_CHANNELS)
    arguments = {
        "source_ptr": tensor,
        "target_ptr": target,
        "channels": channels,
        "voxels": voxels,
        "BLOCK_C": block_c,
        "BLOCK_V": VOXELS,
    }
    programs = batch * ceil_div(channels, block_c) * ceil_div(voxels, VOXELS)
    return target, Launch(transpose_kernel, (programs,), arguments, {"num_warps": 4})


@triton.jit
def transpose_kernel(source_ptr, target_ptr, channels, voxels, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr):
    blocks_c = (channels + BLOCK_C - 1) // BLOCK_C
    blocks_v = (voxels + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    voxel = program // blocks_c % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    sample = (program // blocks_c // blocks_v).to(tl.int64) * channels * voxels
    c_valid = c < channels
    voxel_valid = voxel < voxels
    values = tl.load(
        source_ptr + sample + c.to(tl.int64)[:, None] * voxels + voxel[None, :],
        mask=c_valid[:, None] & voxel_valid[None, :],
        other=0.0,
    )
    tl.store(
        target_ptr + sample + voxel.to(tl.int64)[:, None] * channels + c[None, :],
        values.T,
        mask=voxel_valid[:, None] & c_valid[None, :],
    )
