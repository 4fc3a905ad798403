"""Volume-to-column (im2col) in bounded tiles and a matrix product, out of torch operations; CPU and CUDA.

Copy the input voxels that each output voxel v meets, one per (channel, tap) k, into a matrix of columns.
Two passes are then products of matrices, per group (Chellapilla, Puri and Simard 2006):

    y[o, v]      = sum over k of  weight[o, k] * columns[k, v]
    grad_w[o, k] = sum over v of  grad_output[o, v] * columns[k, v]

All columns of a 3x3x3 convolution together are 27 times its input. Here they are made for a tile of output
voxels at a time, at most `COLUMN_BYTES` of them (or one voxel's, where that is more).

The third pass is the first one again. Along one axis, with stride s, padding p, dilation e and g = gcd(s, e),
input voxel u = r + s * q of residue r meets output voxel t through tap a when  u + p = s * t + e * a.  The
taps for which t is whole are  a = a_0 + (s / g) * b,  b = 0, 1, ..., and for them

    t = q + (r + p - e * a_0) / s - (e / g) * b.

So the voxels of one residue are a convolution of grad_output with every (s / g)-th tap, in reverse order,
stride 1 and dilation e / g: nothing is multiplied with the zeros between strides, nothing is scattered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]

COLUMN_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Largest buffer of columns: on a CPU so small that the product finds it in the cache, on a GPU so large
that the time to launch kernels does not show."""

CHANNELS_FOR_CHANNEL_RUNS = 8
"""From this many channels per group on, columns of a channels-last input are copied channel by channel;
below, runs along the width are longer."""


class Axis(NamedTuple):
    """One axis of a window: output position q meets through tap a the source position q * stride + a * dilation -
    padding; a source position outside of the source is a zero."""

    size: int
    taps: int
    stride: int
    padding: int
    dilation: int


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
    axes = [Axis(*axis) for axis in zip(y.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)]
    if bias is not None:
        bias = bias.view(groups, -1, 1)
    _convolve(x, weight.unflatten(0, (groups, -1)), bias, axes, y)


def grad_input(
    grad_output: Tensor, weight: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int, grad_x: Tensor
) -> None:
    """Write the gradient with respect to the input into grad_x."""
    # (G, C_out / G, C_in / G, taps) -> (G, C_in / G, C_out / G, taps): input channels are what comes out.
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    for residues in itertools.product(*map(range, stride)):
        taps: list[Sequence[int]] = []
        axes = []
        for axis, (r, s, p, e) in enumerate(zip(residues, stride, padding, dilation, strict=True)):
            size = len(range(r, grad_x.shape[2 + axis], s))
            used = [tap for tap in range(weight.shape[3 + axis]) if (r + p - tap * e) % s == 0]
            step = e // math.gcd(s, e)
            last = (r + p - used[-1] * e) // s if used else 0
            taps.append(used[::-1])
            axes.append(Axis(size, len(used), 1, -last, step))
        voxels = grad_x[:, :, residues[0] :: stride[0], residues[1] :: stride[1], residues[2] :: stride[2]]
        if voxels.numel() == 0:
            continue
        if not all(taps):
            voxels.zero_()
            continue
        used_weight = weight[:, :, :, taps[0]][:, :, :, :, taps[1]][:, :, :, :, :, taps[2]]
        _convolve(grad_output, used_weight, None, axes, voxels)


def grad_weight(
    grad_output: Tensor, x: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int, grad_w: Tensor
) -> None:
    """Write the gradient with respect to the weight into grad_w; tiles are summed in order."""
    axes = [
        Axis(*axis) for axis in zip(grad_output.shape[2:], grad_w.shape[2:], stride, padding, dilation, strict=True)
    ]
    by_group = grad_w.unflatten(0, (groups, -1))
    group, out_channels, channels, *taps = by_group.shape
    total = grad_w.new_zeros(group, out_channels, channels * math.prod(taps))
    for tile, columns in _columns(x, axes, groups):
        total.baddbmm_(_part(_by_group(grad_output, groups), tile).flatten(2), columns.transpose(1, 2))
    if _channel_runs(x, groups):
        by_group.copy_(total.view(group, out_channels, *taps, channels).movedim(-1, 2))
    else:
        by_group.copy_(total.view(by_group.shape))


def _convolve(source: Tensor, weight: Tensor, bias: Tensor | None, axes: Sequence[Axis], result: Tensor) -> None:
    """result = weight * columns of source + bias; weight is (G, rows, channels, taps...), bias (G, rows, 1)."""
    groups = weight.shape[0]
    matrix = (weight.movedim(2, -1) if _channel_runs(source, groups) else weight).flatten(2)
    by_group = _by_group(result, groups)
    addend, beta = (matrix.new_zeros(1, 1, 1), 0) if bias is None else (bias, 1)
    for tile, columns in _columns(source, axes, groups):
        target = _part(by_group, tile)
        out = _as_matrices(target)
        # beta=0 ignores what is added to, which stands in for a bias that is not there.
        product = torch.baddbmm(addend, matrix, columns, beta=beta, out=out)
        if out is None:
            target.copy_(product.view(target.shape))


def _by_group(activation: Tensor, groups: int) -> Tensor:
    """(N, C, D, H, W) as (G, C / G, N, D, H, W), a view."""
    return torch.unflatten(activation, 1, (groups, -1)).movedim(0, 2)


def _part(tensor: Tensor, slices: Sequence[slice]) -> Tensor:
    """The last axes of a tensor cut to one slice each, a view."""
    index: tuple[EllipsisType | slice, ...] = (..., *slices)
    return tensor[index]


def _as_matrices(target: Tensor) -> Tensor | None:
    """(G, rows, n, d, h, w) as (G, rows, voxels) where that is a view: a channels-last tile, or one of one sample."""
    groups, rows = target.shape[:2]
    voxels_outermost = target.permute(2, 3, 4, 5, 0, 1)
    if voxels_outermost.is_contiguous():
        return voxels_outermost.view(-1, groups, rows).permute(1, 2, 0)
    if target[0, 0].is_contiguous():
        return target.view(groups, rows, -1)
    return None


def _columns(source: Tensor, axes: Sequence[Axis], groups: int) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """For each tile (n, d, h, w) of output voxels, its columns (G, channels * taps, voxels).

    The columns of all tiles share one buffer: use them before asking for the next.
    """
    batch, all_channels = source.shape[:2]
    channels = all_channels // groups
    taps = [axis.taps for axis in axes]
    rows = channels * math.prod(taps)
    channel_runs = _channel_runs(source, groups)
    limit = COLUMN_BYTES[source.device.type] // (groups * rows * source.element_size())
    sizes = [batch, *(axis.size for axis in axes)]
    tile_sizes = _tile_sizes(sizes, limit)
    buffer = source.new_empty(groups * rows * math.prod(tile_sizes))
    for start in itertools.product(*(range(0, size, step) for size, step in zip(sizes, tile_sizes, strict=True))):
        tile = tuple(
            slice(first, min(first + step, size)) for first, step, size in zip(start, tile_sizes, sizes, strict=True)
        )
        # (n, G, channels, d, h, w, taps...)
        windows = _windows(source[tile[0]], axes, tile[1:]).unflatten(1, (groups, channels))
        if channel_runs:
            windows = windows.permute(1, 0, 3, 4, 5, 6, 7, 8, 2)
        else:
            windows = windows.permute(1, 2, 6, 7, 8, 0, 3, 4, 5)
        columns = buffer[: windows.numel()].view(windows.shape).copy_(windows)
        yield tile, columns.view(groups, -1, rows).transpose(1, 2) if channel_runs else columns.view(groups, rows, -1)


def _channel_runs(source: Tensor, groups: int) -> bool:
    """Whether columns keep the channels of one tap side by side, (voxel, tap, channel); else (channel, tap, voxel)."""
    return source.stride(1) == 1 and source.shape[1] // groups >= CHANNELS_FOR_CHANNEL_RUNS


def _tile_sizes(sizes: Sequence[int], limit: int) -> list[int]:
    """The largest tile of at most `limit` voxels (at least one) that is one run in row-major order."""
    steps: list[int] = []
    for size in reversed(sizes):
        step = max(1, min(size, limit))
        steps.insert(0, step)
        limit = limit // size if step == size else 1
    return steps


def _windows(source: Tensor, axes: Sequence[Axis], tile: Sequence[slice]) -> Tensor:
    """What each output position of a tile meets: a view (n, C, d, h, w, taps...) of the source, padded if need be."""
    pads: list[int] = []
    for dimension, (axis, part) in enumerate(zip(axes, tile, strict=True), start=2):
        first = part.start * axis.stride - axis.padding
        length = (part.stop - 1 - part.start) * axis.stride + (axis.taps - 1) * axis.dilation + 1
        begin = min(max(first, 0), source.shape[dimension])
        end = min(max(first + length, begin), source.shape[dimension])
        source = source.narrow(dimension, begin, end - begin)
        before = min(max(-first, 0), length)
        pads = [before, length - before - (end - begin), *pads]
    source = F.pad(source, pads) if any(pads) else source
    for dimension, axis in enumerate(axes, start=2):
        source = source.unfold(dimension, (axis.taps - 1) * axis.dilation + 1, axis.stride)
    return _part(source, [slice(None, None, axis.dilation) for axis in axes])
