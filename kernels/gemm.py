"""Convolutions whose windows do not overlap, each pass as one matrix product; CPU and CUDA.

Where no two windows share a voxel (a stride as long as the kernel, a kernel of one tap, one window per sample) and
nothing is padded, a convolution only reorders its input: each window v becomes a row p of K = C_in * taps values, in
the order of the weight's, and

    y[n, v, o]         = sum over k of  p[n, v, k] * weight[o, k] + bias[o]
    grad_p[n, v, k]    = sum over o of  grad_output[n, v, o] * weight[o, k]
    grad_weight[o, k]  = sum over n, v of  grad_output[n, v, o] * p[n, v, k].

Rows are a view of the input where its strides allow that (one tap; windows that are whole samples, or whole slices of
a channels-last tensor), else a copy of it. Activations in ncdhw are read and written as the transposed matrices that
they are, one for each sample; samples with few windows each are copied into one matrix instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Triple = tuple[int, int, int]

FEWEST_ROWS = 64
"""Samples with fewer windows than this do not fill the tile of a product of their own."""

LARGEST_BATCH = 65_535
"""Most products in one batch: the last axis of a CUDA grid, beyond which libraries have failed or been wrong."""

LARGEST_STRIDE = 2**31 - 1
"""Of a matrix in BLAS, which counts in 32 bits."""


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    y: Tensor,
) -> None:
    """Write the convolution of x with weight, plus bias, into y."""
    rows = _rows(_windows(x, weight, y, stride, padding, dilation, groups))
    _multiply(rows, _matrix(weight).t(), bias, _voxels(y))


def grad_input(
    grad_output: Tensor, weight: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int, grad_x: Tensor
) -> None:
    """Write the gradient with respect to the input into grad_x; zeros where no window reaches."""
    windows = _windows(grad_x, weight, grad_output, stride, padding, dilation, groups)
    if windows.numel() < grad_x.numel():
        grad_x.zero_()
    rows = _viewed_as_rows(windows)
    if rows is not None:
        _multiply(_voxels(grad_output), _matrix(weight), None, rows)
    else:
        dense = _dense_like(windows)
        _multiply(_voxels(grad_output), _matrix(weight), None, _rows(dense))
        windows.copy_(dense)


def grad_weight(
    grad_output: Tensor, x: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int, grad_w: Tensor
) -> None:
    """Write the gradient with respect to the weight into grad_w."""
    rows = _rows(_windows(x, grad_w, grad_output, stride, padding, dilation, groups))
    voxels, result = _voxels(grad_output), _matrix(grad_w)
    batch, count, _ = rows.shape
    to_be_copied = count * sum(matrix.shape[2] for matrix in (voxels, rows) if _merged(matrix) is None)
    if batch <= LARGEST_BATCH and result.numel() < to_be_copied:
        # A product for each sample moves less than what has to be copied for a single one.
        result.copy_(_partial_products(voxels.transpose(1, 2), rows).sum(0))
    else:
        torch.mm(voxels.flatten(0, 1).t(), rows.flatten(0, 1), out=result)


def copies_windows(
    x: Tensor, weight: Tensor, y: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int
) -> bool:
    """Whether the windows as they lie in x are no matrix; tensors may be on the "meta" device."""
    return _viewed_as_rows(_windows(x, weight, y, stride, padding, dilation, groups)) is None


def _windows(
    x: Tensor, weight: Tensor, y: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int
) -> Tensor:
    """What each voxel of y meets, a view of x: (N, D, H, W) of y, then channels and taps in the order of the weight."""
    assert groups == 1
    assert not any(padding)
    windows = x
    axes = zip(y.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    for axis, (size, taps, step, distance) in enumerate(axes, start=2):
        extent = (taps - 1) * distance + 1
        assert size == 1 or extent <= step
        windows = windows.unfold(axis, extent, step)
    if dilation != (1, 1, 1):
        windows = windows[..., :: dilation[0], :: dilation[1], :: dilation[2]]
    return windows.permute(0, 2, 3, 4, *((5, 6, 7, 1) if _channels_last(weight) else (1, 5, 6, 7)))


def _channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last_3d)


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, K), a view."""
    return (weight.movedim(1, -1) if _channels_last(weight) else weight).view(weight.shape[0], -1)


def _voxels(activation: Tensor) -> Tensor:
    """(N, voxels, C), a view of either layout."""
    return activation.view(*activation.shape[:2], -1).transpose(1, 2)


def _rows(windows: Tensor) -> Tensor:
    """(N, windows of a sample, K), a view if there is one."""
    rows = _viewed_as_rows(windows)
    if rows is None:
        rows = _viewed_as_rows(_dense_like(windows).copy_(windows))
        assert rows is not None
    return rows


def _viewed_as_rows(windows: Tensor) -> Tensor | None:
    if _merge(windows, 1, 4) and _merge(windows, 4, 8) and _finest(windows, 0, 4) <= LARGEST_STRIDE:
        return windows.view(windows.shape[0], math.prod(windows.shape[1:4]), -1)
    return None


def _merged(matrices: Tensor) -> Tensor | None:
    """(N, rows, columns) as (N * rows, columns), or None where that is no view."""
    return matrices.view(-1, matrices.shape[2]) if _merge(matrices, 0, 2) else None


def _merge(tensor: Tensor, start: int, stop: int) -> bool:
    """Whether axes start to stop - 1 are one axis in memory; where they are not, asking `view` costs an exception."""
    wanted = None
    for size, stride in zip(reversed(tensor.shape[start:stop]), reversed(tensor.stride()[start:stop]), strict=True):
        if size > 1:
            if wanted not in (None, stride):
                return False
            wanted = size * stride
    return True


def _dense_like(windows: Tensor) -> Tensor:
    """Uninitialised; what lies side by side in the windows, values of a row or voxels, does so here."""
    batch, *voxels = windows.shape[:4]
    row = windows.shape[4:]
    if math.prod(voxels) >= FEWEST_ROWS and _finest(windows, 1, 4) < _finest(windows, 4, 8):
        return windows.new_empty(batch, *row, *voxels).permute(0, 5, 6, 7, 1, 2, 3, 4)
    return windows.new_empty(windows.shape)


def _finest(tensor: Tensor, start: int, stop: int) -> int:
    """The least distance in memory along axes start to stop - 1, 0 where they hold a single value."""
    axes = zip(tensor.shape[start:stop], tensor.stride()[start:stop], strict=True)
    return min((stride for size, stride in axes if size > 1), default=0)


def _multiply(rows: Tensor, factor: Tensor, bias: Tensor | None, result: Tensor) -> None:
    """result = rows @ factor + bias; (N, rows, inner) times (inner, columns)."""
    flat, target = _merged(rows), _merged(result)
    if flat is not None and target is not None:
        _single_product(flat, factor, bias, target)
    elif rows.shape[1] < FEWEST_ROWS or rows.shape[0] > LARGEST_BATCH:
        product = result.new_empty(result.shape)
        _single_product(rows.flatten(0, 1), factor, bias, product.flatten(0, 1))
        result.copy_(product)
    else:
        factors = factor.expand(rows.shape[0], -1, -1)
        if bias is None:
            torch.bmm(rows, factors, out=result)
        else:
            torch.baddbmm(bias, rows, factors, out=result)


def _single_product(rows: Tensor, factor: Tensor, bias: Tensor | None, result: Tensor) -> None:
    if bias is None:
        torch.mm(rows, factor, out=result)
    else:
        torch.addmm(bias, rows, factor, out=result)


def _partial_products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right sample by sample, in float32 where the device can store it so: rounded once, when added."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right)
