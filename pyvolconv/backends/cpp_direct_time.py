"""What share of the FMA peak `cpp.direct` is expected to reach: its cost model, fitted to measurements
(docs/performance.md).

Where two wide FMAs start per cycle, layers with unit stride, without groups and with 16 channels or more have costs of
their own, of the layers of ten networks on a Sapphire Rapids; what they write counts in whole vectors of channels.
"""

from __future__ import annotations

from ..problem import DTYPE_BYTES, ConvProblem, Layout, Pass
from .linear_time import Costs, fewer_lanes, summed, used_share

POINTWISE_COSTS: dict[Pass, dict[Layout, Costs]] = {
    "forward": {"ncdhw": Costs(1.8, 8.5, 26, 65, 2.4e6), "ndhwc": Costs(1.3, 20, 8.5, 75, 2e6)},
    "grad_input": {"ncdhw": Costs(1.95, 10, 16, 33, 2.2e6), "ndhwc": Costs(1.36, 14.5, 9.6, 40, 2e6)},
    "grad_weight": {"ncdhw": Costs(1.5, 22, 19, 67, 2.4e6), "ndhwc": Costs(1.75, 7.6, 11, 79, 2.2e6)},
}

WINDOW_COSTS: dict[Pass, dict[Layout, Costs]] = {
    "forward": {"ncdhw": Costs(1.66, 57, 0, 87, 1e6), "ndhwc": Costs(1.39, 26, 0, 85, 3e6)},
    "grad_input": {"ncdhw": Costs(1.68, 75, 0, 119, 5e6), "ndhwc": Costs(1.4, 11, 17, 110, 2.6e6)},
    "grad_weight": {"ncdhw": Costs(1.45, 70, 0, 195, 2e7), "ndhwc": Costs(1.58, 38, 0, 188, 1e6)},
}


DEPTHWISE_COSTS = Costs(1.72, 14.7, 14.7, 0, 5e6)
"""Forward in ndhwc with 3 or 5 taps along the width and unit stride, on the tensors themselves."""

COMPETING_BYTES, COMPETING = 1 << 17, 1.7
"""Planes that are multiples of this apart lie in the same sets of the second-level cache: how many times as long three
taps take then, which have little to compute meanwhile."""


OVERLAPPING: dict[Layout, float] = {"ncdhw": 2.0, "ndhwc": 1.3}
"""How many times as long it takes in front of a max-pool whose windows overlap."""


def expected_share(problem: ConvProblem, pass_: Pass, lanes: int, cheap: bool) -> float:
    """FLOPs over the time of the same number at peak, with vectors of `lanes` values.

    0.82 of peak at 16 channels and more in ndhwc, 0.75 in ncdhw, where strides and dilation break rows into pieces, by
    the share of lanes in use, and the time of 12 FLOPs for every byte to be moved; gradients of weights 0.8. Where two
    wide FMAs start per cycle (`cheap`), loads and transposes keep the kernels to a smaller share of that, and a byte
    takes the time of 2.5 times as many FLOPs.
    """
    if cheap and problem.pool is not None and problem.pool.overlap > 1:
        # Rows of windows that overlap are kept, or computed again.
        return expected_share(problem.without_epilogue(), pass_, lanes, cheap) / OVERLAPPING[problem.layout]
    if cheap and _has_costs(problem):
        costs = POINTWISE_COSTS if problem.kernel_size == (1, 1, 1) else WINDOW_COSTS
        targets = problem.in_channels if pass_ == "grad_input" else problem.out_channels
        products = fewer_lanes(problem) * problem.flops(pass_) / used_share(targets, lanes)
        return problem.flops(pass_) / summed(problem, costs[pass_][problem.layout], products)
    if cheap and pass_ == "forward" and _is_depthwise_in_place(problem):
        products = problem.flops(pass_) / used_share(problem.out_channels, lanes)
        return problem.flops(pass_) / (_held_up(problem) * summed(problem, DEPTHWISE_COSTS, products))
    moved = (2.5 if cheap else 1.0) * problem.min_bytes(pass_) / problem.flops(pass_)
    if cheap and problem.kernel_size == problem.stride != (1, 1, 1):
        moved *= 0.6  # no value is packed for two windows
    if pass_ == "grad_weight":
        used = max(used_share(problem.in_channels, lanes), used_share(problem.input_size[2], lanes))
        share = 1 / (fewer_lanes(problem) / ((0.66 if cheap else 0.8) * used) + 12 * moved)
    elif problem.kernel_size == (1, 1, 1) and problem.groups == 1:
        share = _pointwise(problem, pass_, lanes, cheap, moved)
    else:
        share = _window(problem, pass_, lanes, cheap, moved)
    return 1 / (1 / share + (2e6 if cheap else 1e6) / problem.flops(pass_))


def _is_depthwise_in_place(problem: ConvProblem) -> bool:
    return (
        problem.dtype == "float32"
        and problem.layout == "ndhwc"
        and problem.groups == problem.in_channels == problem.out_channels >= 16
        and problem.stride == problem.dilation == (1, 1, 1)
        and problem.kernel_size[2] in (3, 5)
        and problem.pool is None
    )


def _held_up(problem: ConvProblem) -> float:
    plane = problem.input_size[1] * problem.input_size[2] * problem.in_channels * DTYPE_BYTES[problem.dtype]
    return COMPETING if plane % COMPETING_BYTES == 0 and problem.kernel_size[0] <= 3 else 1.0


def _has_costs(problem: ConvProblem) -> bool:
    return (
        problem.dtype in ("float32", "float64")
        and problem.groups == 1
        and problem.stride == (1, 1, 1)
        and min(problem.in_channels, problem.out_channels) >= 16
    )


def _pointwise(problem: ConvProblem, pass_: Pass, lanes: int, cheap: bool, moved: float) -> float:
    """Packed less than a window, in ndhwc not at all where it has no more columns than depth; there few channels on
    either side leave its lanes or its loop empty."""
    targets, sources = problem.out_channels, problem.in_channels
    if pass_ == "grad_input":
        targets, sources = sources, targets
    in_order = problem.layout == "ndhwc"
    used = used_share(targets, lanes) * min(1, sources / lanes) if in_order else 0.69 if cheap else 1.0
    return 1 / (fewer_lanes(problem) / ((0.75 if in_order and targets > sources else 0.88) * used) + 5 * moved)


def _window(problem: ConvProblem, pass_: Pass, lanes: int, cheap: bool, moved: float) -> float:
    ndhwc, depthwise = problem.layout == "ndhwc", 1 < problem.groups == problem.in_channels
    targets = problem.in_channels if pass_ == "grad_input" else problem.out_channels
    if not depthwise:
        targets //= problem.groups
    width = problem.output_size[2] if pass_ == "forward" else problem.input_size[2]
    reached = 0.82 if ndhwc else 0.75 if problem.stride == problem.dilation == (1, 1, 1) else 0.58
    if pass_ == "grad_input" and targets < lanes // 2 and problem.reduction_length(pass_) == problem.out_channels:
        # One tap meets a voxel: vectors of few channels, or of voxels that are far apart.
        reached *= 0.35 if ndhwc else 0.15
    along_channels, along_the_width = used_share(targets, lanes), used_share(width, lanes)
    if cheap and ndhwc and problem.groups > 1 and not depthwise:
        along_the_width = 0.0  # lanes are the channels of a group
    elif cheap and not ndhwc and depthwise and problem.stride[2] > 1:
        along_the_width *= 0.045  # values of a row are picked one by one
    if cheap:
        # Lanes that are voxels of a row are transposed, in ncdhw less.
        few = along_channels <= (0.5 if ndhwc else 0.45)
        one_group = problem.groups == 1
        if few:
            reached *= 0.25 if pass_ == "grad_input" and one_group else 0.5 if problem.stride[2] == 1 else 0.2
        else:
            reached *= 0.83
    return 1 / (fewer_lanes(problem) / (reached * max(along_channels, along_the_width)) + 12 * moved)
