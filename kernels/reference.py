"""The three passes as plain loops: the definition of a convolution, to be read and to be compared with.

Letters, as everywhere in this package: sample n; output channel o; input channel c, counted inside its
group; voxel (d, h, w); kernel tap (i, j, k) along depth, height, width. With stride s, padding p before
each axis and dilation e, an output voxel meets through a tap the input voxel

    input = output * s - p + tap * e        along each axis,

so a value of the output sums over (c, i, j, k), one of the input's gradient over (o, i, j, k) and the
output voxel that the equation gives, if there is one, and one of the weight's gradient over (n, d, h, w).

Each result is summed by one thread in the order of the loops, in the dtype of the arrays: the bits do not
depend on the number of threads. (`np.int64` around a parallel index: Numba counts it in uint64, and an
operation of uint64 with int64 is one of float64.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numba
import numpy as np
from numba import prange

Triple = tuple[int, int, int]
Array = np.ndarray[Any, Any]


def forward(
    x: Array, weight: Array, bias: Array, stride: Triple, padding: Triple, dilation: Triple, groups: int, y: Array
) -> None:
    """y[n, o, d, h, w] = bias[o] + sum of x * weight over (c, i, j, k)."""
    _, _, depth, height, width = x.shape
    out_channels, channels_per_group, kernel_depth, kernel_height, kernel_width = weight.shape
    batch, _, depth_out, height_out, width_out = y.shape
    for plane in prange(batch * out_channels):
        n, o = divmod(np.int64(plane), out_channels)
        first_channel = o // (out_channels // groups) * channels_per_group
        for d in range(depth_out):
            for h in range(height_out):
                for w in range(width_out):
                    total = bias[o]
                    for c in range(channels_per_group):
                        for i in range(kernel_depth):
                            d_in = d * stride[0] - padding[0] + i * dilation[0]
                            if d_in < 0 or d_in >= depth:
                                continue
                            for j in range(kernel_height):
                                h_in = h * stride[1] - padding[1] + j * dilation[1]
                                if h_in < 0 or h_in >= height:
                                    continue
                                for k in range(kernel_width):
                                    w_in = w * stride[2] - padding[2] + k * dilation[2]
                                    if w_in < 0 or w_in >= width:
                                        continue
                                    total += x[n, first_channel + c, d_in, h_in, w_in] * weight[o, c, i, j, k]
                    y[n, o, d, h, w] = total


def grad_input(
    grad_output: Array, weight: Array, stride: Triple, padding: Triple, dilation: Triple, groups: int, grad_x: Array
) -> None:
    """grad_x[n, c, d, h, w] = sum of grad_output * weight over (o, i, j, k), where a tap leads to a whole voxel."""
    _, _, depth_out, height_out, width_out = grad_output.shape
    out_channels, channels_per_group, kernel_depth, kernel_height, kernel_width = weight.shape
    batch, in_channels, depth, height, width = grad_x.shape
    for plane in prange(batch * in_channels):
        n, channel = divmod(np.int64(plane), in_channels)
        group, c = divmod(channel, channels_per_group)
        first_output = group * (out_channels // groups)
        for d in range(depth):
            for h in range(height):
                for w in range(width):
                    total = grad_x.dtype.type(0)
                    for o in range(first_output, first_output + out_channels // groups):
                        for i in range(kernel_depth):
                            d_out, rest = divmod(d + padding[0] - i * dilation[0], stride[0])
                            if rest != 0 or d_out < 0 or d_out >= depth_out:
                                continue
                            for j in range(kernel_height):
                                h_out, rest = divmod(h + padding[1] - j * dilation[1], stride[1])
                                if rest != 0 or h_out < 0 or h_out >= height_out:
                                    continue
                                for k in range(kernel_width):
                                    w_out, rest = divmod(w + padding[2] - k * dilation[2], stride[2])
                                    if rest != 0 or w_out < 0 or w_out >= width_out:
                                        continue
                                    total += grad_output[n, o, d_out, h_out, w_out] * weight[o, c, i, j, k]
                    grad_x[n, channel, d, h, w] = total


def grad_weight(
    grad_output: Array, x: Array, stride: Triple, padding: Triple, dilation: Triple, groups: int, grad_w: Array
) -> None:
    """grad_w[o, c, i, j, k] = sum of grad_output * x over (n, d, h, w)."""
    batch, _, depth, height, width = x.shape
    _, _, depth_out, height_out, width_out = grad_output.shape
    out_channels, channels_per_group, kernel_depth, kernel_height, kernel_width = grad_w.shape
    for pair in prange(out_channels * channels_per_group):
        o, c = divmod(np.int64(pair), channels_per_group)
        channel = o // (out_channels // groups) * channels_per_group + c
        for i in range(kernel_depth):
            for j in range(kernel_height):
                for k in range(kernel_width):
                    total = grad_w.dtype.type(0)
                    for n in range(batch):
                        for d in range(depth_out):
                            d_in = d * stride[0] - padding[0] + i * dilation[0]
                            if d_in < 0 or d_in >= depth:
                                continue
                            for h in range(height_out):
                                h_in = h * stride[1] - padding[1] + j * dilation[1]
                                if h_in < 0 or h_in >= height:
                                    continue
                                for w in range(width_out):
                                    w_in = w * stride[2] - padding[2] + k * dilation[2]
                                    if w_in < 0 or w_in >= width:
                                        continue
                                    total += grad_output[n, o, d, h, w] * x[n, channel, d_in, h_in, w_in]
                    grad_w[o, c, i, j, k] = total


LOOPS: dict[str, Callable[..., None]] = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}


@cache
def compiled(pass_: Literal["forward", "grad_input", "grad_weight"], parallel: bool) -> Callable[..., None]:
    """The loops of one pass as machine code, on Numba's threads or on the caller's alone."""
    return machine_code(LOOPS[pass_], parallel)


def machine_code(loops: Callable[..., None], parallel: bool) -> Callable[..., None]:
    """`loops` compiled by Numba.

    The parallel code is kept on disk, where Numba finds a folder that it can write. Numba's key for such a
    file does not say whether the code is parallel, so the serial code is compiled anew in each process that
    asks for it: read from that file it would be the parallel one.
    """
    options: dict[str, Any] = {"nogil": True, "parallel": parallel}
    try:
        result: Callable[..., None] = numba.njit(cache=parallel, **options)(loops)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        result = numba.njit(**options)(loops)
    return result
