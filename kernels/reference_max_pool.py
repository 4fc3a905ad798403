"""The fused passes as plain loops: convolution, activation and max-pool, and the sparse way back.

Letters as in `reference`, and (p, q, r) for a pooled voxel. Its window holds the output voxels

    voxel = pooled * pool_stride - pool_padding + offset,  0 <= offset < window,    along each axis

that exist. The first of them with the largest activation is chosen; a NaN is larger than any number, the last NaN
the largest. `code` is the chosen offset, counted row by row: (offset_d * window_h + offset_h) * window_w + offset_w, or
NO_VOXEL where relu makes the whole window zero: nothing is chosen there, since no gradient passes.

Of the gradient before the pool only the chosen voxels are not zero, so each gradient runs over pooled voxels, looks up
the output voxel that was chosen, and goes on as without a pool. One thread sums a result, in the order of the loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numba
import numpy as np
from numba import prange

from .reference import Array, Triple, machine_code

NONE, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH = range(6)
"""Activations, in the order of `pyvolconv.epilogue.ACTIVATIONS`."""

NO_VOXEL = 255
"""The code of a window that chooses none, `pyvolconv.epilogue.NO_VOXEL`."""


@numba.njit(inline="always")
def activate(value: float, activation: int, slope: float, zero: float) -> float:
    """The activation of one value; `slope`, that of leaky_relu, and `zero` have its dtype."""
    if activation == RELU:
        return zero if value <= 0 else value
    if activation == LEAKY_RELU:
        return value * slope if value < 0 else value
    if activation == SILU:
        return value / (1 + math.exp(-value))
    if activation == GELU:
        return value * (1 + math.erf(value * math.sqrt(0.5))) / 2
    if activation == GELU_TANH:
        return value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) / 2
    return value


@numba.njit(inline="always")
def convolve_at(
    x: Array,
    weight: Array,
    bias: Array,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    n: int,
    o: int,
    d: int,
    h: int,
    w: int,
) -> Any:
    """One output voxel of the convolution."""
    _, _, depth, height, width = x.shape
    out_channels, channels_per_group, kernel_depth, kernel_height, kernel_width = weight.shape
    first_channel = o // (out_channels // groups) * channels_per_group
    total = bias[o]
    for c in range(channels_per_group):
        for i in range(kernel_depth):
            for j in range(kernel_height):
                for k in range(kernel_width):
                    d_in = d * stride[0] - padding[0] + i * dilation[0]
                    h_in = h * stride[1] - padding[1] + j * dilation[1]
                    w_in = w * stride[2] - padding[2] + k * dilation[2]
                    if 0 <= d_in < depth and 0 <= h_in < height and 0 <= w_in < width:
                        total += x[n, first_channel + c, d_in, h_in, w_in] * weight[o, c, i, j, k]
    return total


@numba.njit(inline="always")
def chosen_voxel(
    code: int, p: int, q: int, r: int, window: Triple, pool_stride: Triple, pool_padding: Triple
) -> tuple[Any, Any, Any]:
    """The output voxel that the window of a pooled voxel chose."""
    offset_d, rest = divmod(np.int64(code), window[1] * window[2])
    offset_h, offset_w = divmod(rest, window[2])
    return (
        p * pool_stride[0] - pool_padding[0] + offset_d,
        q * pool_stride[1] - pool_padding[1] + offset_h,
        r * pool_stride[2] - pool_padding[2] + offset_w,
    )


def forward(
    x: Array,
    weight: Array,
    bias: Array,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    activation: int,
    slope: float,
    window: Triple,
    pool_stride: Triple,
    pool_padding: Triple,
    output_size: Triple,
    pooled: Array,
    code: Array,
) -> None:
    """pooled: the chosen activation, or for silu and gelu the value that it is of; code: where it stands."""
    batch, out_channels, pooled_depth, pooled_height, pooled_width = pooled.shape
    for plane in prange(batch * out_channels):
        n, o = divmod(np.int64(plane), out_channels)
        for p in range(pooled_depth):
            for q in range(pooled_height):
                for r in range(pooled_width):
                    is_first, largest = True, -np.inf
                    for offset in range(window[0] * window[1] * window[2]):
                        d, h, w = chosen_voxel(offset, p, q, r, window, pool_stride, pool_padding)
                        if not (0 <= d < output_size[0] and 0 <= h < output_size[1] and 0 <= w < output_size[2]):
                            continue
                        value = convolve_at(x, weight, bias, stride, padding, dilation, groups, n, o, d, h, w)
                        activated = activate(value, activation, slope, pooled.dtype.type(0))
                        if is_first or activated > largest or activated != activated:
                            is_first = False
                            largest = activated
                            pooled[n, o, p, q, r] = value if activation >= SILU else activated
                            code[n, o, p, q, r] = offset
                    if activation == RELU and largest <= 0:
                        code[n, o, p, q, r] = NO_VOXEL


def grad_input(
    grad: Array,
    code: Array,
    weight: Array,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    window: Triple,
    pool_stride: Triple,
    pool_padding: Triple,
    grad_x: Array,
) -> None:
    """grad_x[n, c] = sum of grad * weight over (o, i, j, k) and pooled voxels, at the voxels that they reach."""
    _, _, pooled_depth, pooled_height, pooled_width = grad.shape
    out_channels, channels_per_group, kernel_depth, kernel_height, kernel_width = weight.shape
    batch, in_channels, depth, height, width = grad_x.shape
    for plane in prange(batch * in_channels):
        n, channel = divmod(np.int64(plane), in_channels)
        group, c = divmod(channel, channels_per_group)
        first_output = group * (out_channels // groups)
        grad_x[n, channel] = 0
        for o in range(first_output, first_output + out_channels // groups):
            for p in range(pooled_depth):
                for q in range(pooled_height):
                    for r in range(pooled_width):
                        if code[n, o, p, q, r] == NO_VOXEL:
                            continue
                        d, h, w = chosen_voxel(code[n, o, p, q, r], p, q, r, window, pool_stride, pool_padding)
                        for i in range(kernel_depth):
                            for j in range(kernel_height):
                                for k in range(kernel_width):
                                    d_in = d * stride[0] - padding[0] + i * dilation[0]
                                    h_in = h * stride[1] - padding[1] + j * dilation[1]
                                    w_in = w * stride[2] - padding[2] + k * dilation[2]
                                    if 0 <= d_in < depth and 0 <= h_in < height and 0 <= w_in < width:
                                        product = grad[n, o, p, q, r] * weight[o, c, i, j, k]
                                        grad_x[n, channel, d_in, h_in, w_in] += product


def grad_weight(
    grad: Array,
    code: Array,
    x: Array,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    window: Triple,
    pool_stride: Triple,
    pool_padding: Triple,
    grad_w: Array,
    grad_b: Array,
) -> None:
    """grad_w[o, c, i, j, k] = sum of grad * x over (n, p, q, r), grad_b[o] = sum of grad."""
    batch, _, depth, height, width = x.shape
    _, _, pooled_depth, pooled_height, pooled_width = grad.shape
    out_channels, channels_per_group, kernel_depth, kernel_height, kernel_width = grad_w.shape
    for pair in prange(out_channels * channels_per_group):
        o, c = divmod(np.int64(pair), channels_per_group)
        channel = o // (out_channels // groups) * channels_per_group + c
        grad_w[o, c] = 0
        if c == 0:
            grad_b[o] = 0
        for n in range(batch):
            for p in range(pooled_depth):
                for q in range(pooled_height):
                    for r in range(pooled_width):
                        if code[n, o, p, q, r] == NO_VOXEL:
                            continue
                        if c == 0:
                            grad_b[o] += grad[n, o, p, q, r]
                        d, h, w = chosen_voxel(code[n, o, p, q, r], p, q, r, window, pool_stride, pool_padding)
                        for i in range(kernel_depth):
                            for j in range(kernel_height):
                                for k in range(kernel_width):
                                    d_in = d * stride[0] - padding[0] + i * dilation[0]
                                    h_in = h * stride[1] - padding[1] + j * dilation[1]
                                    w_in = w * stride[2] - padding[2] + k * dilation[2]
                                    if 0 <= d_in < depth and 0 <= h_in < height and 0 <= w_in < width:
                                        product = grad[n, o, p, q, r] * x[n, channel, d_in, h_in, w_in]
                                        grad_w[o, c, i, j, k] += product


LOOPS: dict[str, Callable[..., None]] = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}


@cache
def compiled(pass_: Literal["forward", "grad_input", "grad_weight"], parallel: bool) -> Callable[..., None]:
    """The loops of one fused pass as machine code, on Numba's threads or on the caller's alone."""
    return machine_code(LOOPS[pass_], parallel)
