"""Tensors copied from one layout into the other, from csrc/algorithm/reorder.h; faster than copies of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Layout
from .base import MEMORY_FORMAT
from .cpp import call, kernels


def reorder(x: Tensor, layout: Layout) -> Tensor:
    """A copy in `layout` of a float32 or float64 tensor (N, C, D, H, W) that is dense in the other one, on the CPU."""
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=MEMORY_FORMAT[layout])
    samples, channels, voxels = x.shape[0], x.shape[1], x.shape[2:].numel()
    rows, columns = (channels, voxels) if layout == "ndhwc" else (voxels, channels)
    call(kernels().reorder, x.dtype == torch.float64, x, y, options=(samples, rows, columns))
    return y
