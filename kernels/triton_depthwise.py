"""Depthwise and small-group convolution, forward and gradient with respect to the input: registers, not products.

A few channels at a time make no matrix for a tensor core. Such a convolution moves many bytes for few
multiplications, so what counts is that each value is loaded, converted and masked as seldom as possible.

A lane computes a small tile, height x width, of the outputs of one channel and walks along the depth: it loads a plane
of the source once, for all outputs of the tile and for all taps along the depth, whose sums it carries from plane to
plane; where a stride along the depth is in the way, once for each of these taps. Lanes are counted over (tile row,
tile column, channel) in channels_last_3d and over (channel, tile row, tile column) in contiguous tensors, so that
neighbours read what lies side by side whatever the sizes are. Where the rows of a contiguous result allow it, the
outputs of a lane that lie side by side (SIDE_BY_SIDE) are stored together.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .triton_common import Launch, ceil_div, weight_strides
from .triton_depthwise_kernel import depthwise_kernel
from .triton_depthwise_tiles import WARPS, Cut, Triple, tiles


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    y: Tensor,
    cut: Cut | None = None,
) -> list[Launch]:
    """The launch that writes the convolution of x with weight, plus bias, into y."""
    out_channels, _, depth, height, width = weight.shape
    by_output, by_channel, by_tap = weight_strides(weight)
    return _launch(
        source=x,
        weight=weight,
        bias=bias,
        result=y,
        padding=padding,
        cut=cut,
        weight_steps=(by_output * (out_channels // groups), by_output, by_channel, by_tap),
        groups=groups,
        KERNEL=(depth, height, width),
        STRIDE=stride,
        DILATION=dilation,
        GRADIENT=False,
    )


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    grad_x: Tensor,
    cut: Cut | None = None,
) -> list[Launch]:
    """The launch that writes the gradient with respect to the input into grad_x."""
    out_channels, _, depth, height, width = weight.shape
    by_output, by_channel, by_tap = weight_strides(weight)
    return _launch(
        source=grad_output,
        weight=weight,
        bias=None,
        result=grad_x,
        padding=padding,
        cut=cut,
        weight_steps=(by_output * (out_channels // groups), by_channel, by_output, by_tap),
        groups=groups,
        KERNEL=(depth, height, width),
        STRIDE=stride,
        DILATION=dilation,
        GRADIENT=True,
    )


def _launch(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    padding: Triple,
    cut: Cut | None,
    weight_steps: tuple[int, int, int, int],
    groups: int,
    KERNEL: Triple,
    STRIDE: Triple,
    DILATION: Triple,
    GRADIENT: bool,
) -> list[Launch]:
    common = _each(math.gcd, STRIDE, DILATION)
    if GRADIENT:
        tap_step = _each(_quotient, STRIDE, common)
        taps, source_step, spread, result_step = (
            _each(ceil_div, KERNEL, tap_step),
            (1, 1, 1),
            _each(_quotient, DILATION, common),
            STRIDE,
        )
        apart, move = spread, (1, 1, 1)
    else:
        tap_step, taps, source_step, spread, result_step = (1, 1, 1), KERNEL, STRIDE, DILATION, (1, 1, 1)
        apart, move = _each(_quotient, DILATION, common), _each(_quotient, STRIDE, common)
    # Every phase is launched with as many voxels as the largest, the one of residue 0.
    size = _each(ceil_div, result.shape[2:], result_step)
    summed, results = source.shape[1] // groups, result.shape[1] // groups
    channels_last = result.stride(1) == 1 and result.shape[1] > 1
    phases = result.shape[0] * math.prod(result_step)
    tile = tiles(phases, result.shape[1], size, taps, summed, channels_last, move[0] == 1, cut)
    counts = tuple(
        ceil_div(extent, step * count) * step
        for extent, step, count in zip(size, apart, (tile.depth, tile.height, tile.width), strict=True)
    )
    blocks = ceil_div(result.shape[1] * counts[1] * counts[2], tile.lanes)
    arguments: dict[str, Any] = {
        "source_ptr": source,
        "weight_ptr": weight,
        "bias_ptr": weight if bias is None else bias,
        "result_ptr": result,
        "blocks": blocks,
        "counts": counts,
        "steps": tile.depth,
        "size_source": tuple(source.shape[2:]),
        "size_result": tuple(result.shape[2:]),
        "padding": padding,
        "source_strides": source.stride()[:4],
        "result_strides": result.stride()[:4],
        "weight_steps": weight_steps,
        "KERNEL": KERNEL,
        "STRIDE": STRIDE,
        "DILATION": DILATION,
        "TAPS": taps,
        "TAP_STEP": tap_step,
        "SOURCE_STEP": source_step,
        "SPREAD": spread,
        "RESULT_STEP": result_step,
        "APART": apart,
        "MOVE": move,
        "CHANNELS": result.shape[1],
        "SUMMED": summed,
        "RESULTS": results,
        "SOURCE_W": source.stride(4),
        "RESULT_W": result.stride(4),
        "GRADIENT": GRADIENT,
        "HAS_BIAS": bias is not None,
        "CHANNELS_LAST": channels_last,
        "SIDE_BY_SIDE": apart[2] * result_step[2] == result.stride(4) == 1
        and tile.width in (2, 4)
        and result.shape[4] % tile.width == 0,
        "WALK": taps[0] if tile.walk else 1,
        "HOLD": tile.hold and (tile.walk or taps[0] == 1),
        "HEIGHT": tile.height,
        "WIDTH": tile.width,
        "LANES": tile.lanes,
    }
    grid = blocks * counts[0] * phases
    return [Launch(depthwise_kernel, (grid,), arguments, {"num_warps": WARPS})]


def _each(function: Any, first: Any, second: Any) -> Triple:
    depth, height, width = (function(one, other) for one, other in zip(first, second, strict=True))
    return depth, height, width


def _quotient(dividend: int, divisor: int) -> int:
    return dividend // divisor
