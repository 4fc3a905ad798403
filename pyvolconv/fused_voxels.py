"""Codes of a max-pool as torch indices, and the two maps that they define.

`code` holds, for each pooled value, the place of the chosen voxel inside its window, or NO_VOXEL; torch counts voxels
in the whole volume, (d * H + h) * W + w. With such indices "the chosen voxels of a dense tensor" is a gather and its
transpose a scatter with addition, both of which torch differentiates and maps in every mode; where no voxel was chosen
both give zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import NO_VOXEL, MaxPool, Size3


def indices_of_code(code: Tensor, size: Size3, pool: MaxPool) -> Tensor:
    """int64, of the shape of `code` (..., D', H', W'): the chosen voxel's index in a volume of `size` voxels.

    Where none was chosen: 0.
    """
    _, height, width = size
    # A look-up of each code is one pass over all of them; dividing codes would be ten.
    depths, rows, columns = (torch.arange(axis, device=code.device) for axis in pool.window)
    place = ((depths.view(-1, 1, 1) * height + rows.view(-1, 1)) * width + columns).flatten()
    place = F.pad(place, (0, NO_VOXEL + 1 - place.numel()))
    first = (_first_voxel(code, 0, pool) * height + _first_voxel(code, 1, pool)) * width + _first_voxel(code, 2, pool)
    return passed(place[code.int()] + first, code)


def code_of_indices(indices: Tensor, size: Size3, pool: MaxPool) -> Tensor:
    """The inverse: uint8 codes of what `max_pool3d(..., return_indices=True)` returned for a volume of `size`."""
    _, height, width = size
    voxel = (indices // (height * width), indices // width % height, indices % width)
    code = torch.zeros((), dtype=torch.int64, device=indices.device)
    for axis, window in enumerate(pool.window):
        code = code * window + voxel[axis] - _first_voxel(indices, axis, pool)
    return code.to(torch.uint8)


def _first_voxel(pooled: Tensor, axis: int, pool: MaxPool) -> Tensor:
    """Where each window starts along an axis, to be added to a tensor of the shape of `pooled`."""
    windows = pooled.shape[axis - 3]
    start = torch.arange(windows, device=pooled.device) * pool.stride[axis] - pool.padding[axis]
    return start.view(-1, *(1,) * (2 - axis))


def select(dense: Tensor, code: Tensor, pool: MaxPool) -> Tensor:
    """(N, C, D', H', W'): the chosen voxels of `dense` (N, C, D, H, W)."""
    indices = indices_of_code(code, dense.shape[2:], pool)  # type: ignore[arg-type]
    return passed(gather(dense, indices), code)


def gather(dense: Tensor, indices: Tensor) -> Tensor:
    """(N, C, D', H', W'): voxels of `dense` (N, C, D, H, W) by torch's indices."""
    return _in_rows(dense).gather(2, _in_rows(indices)).view(indices.shape)


def scatter(grad: Tensor, code: Tensor, size: Size3, pool: MaxPool) -> Tensor:
    """(N, C, *size): `grad` (N, C, D', H', W') at the chosen voxels, added up where windows agree, else zero."""
    indices = indices_of_code(code, size, pool)
    volume = grad.new_zeros((*grad.shape[:2], size[0] * size[1] * size[2]))
    return volume.scatter_add(2, _in_rows(indices), _in_rows(passed(grad, code))).view(*grad.shape[:2], *size)


def passed(values: Tensor, code: Tensor) -> Tensor:
    """`values` where a voxel was chosen, else zero."""
    return torch.where(code == NO_VOXEL, 0, values)


def _in_rows(tensor: Tensor) -> Tensor:
    """(N, C, voxels); `flatten` has no rule in the vmap that batched gradients of forward mode go through."""
    batch, channels, depth, height, width = tensor.shape
    return tensor.reshape(batch, channels, depth * height * width)
