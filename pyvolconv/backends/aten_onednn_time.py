"""How long oneDNN's float32 kernels are expected to take where two wide FMAs start per cycle, in FLOPs at peak.

Fitted to measurements of the layers of ten networks on a Sapphire Rapids (docs/performance.md). Products count with
channels rounded up to whole vectors of 16 and without taps in the padding; what is moved weighs most, in ncdhw, which
is reordered before and after.
"""

from __future__ import annotations

import math
from typing import Literal

from ..problem import ConvProblem, Layout, Pass
from .linear_time import Costs, summed, used_share

Kind = Literal["pointwise", "dense", "few channels", "strided", "touching"]


COSTS: dict[tuple[Kind, Pass], dict[Layout, Costs]] = {
    ("pointwise", "forward"): {"ncdhw": Costs(0.55, 61, 29, 0, 1.0e8), "ndhwc": Costs(1.05, 13, 2, 43, 5.0e7)},
    ("pointwise", "grad_input"): {"ncdhw": Costs(0.5, 61, 29, 0, 1.2e8), "ndhwc": Costs(1.2, 7, 6, 165, 6.5e7)},
    ("pointwise", "grad_weight"): {"ncdhw": Costs(0, 90, 44, 117, 1.0e8), "ndhwc": Costs(1.3, 14, 4, 35, 8.0e7)},
    ("dense", "forward"): {"ncdhw": Costs(1.42, 59, 0, 102, 7.0e7), "ndhwc": Costs(1.34, 8, 0, 86, 5.0e7)},
    ("dense", "grad_input"): {"ncdhw": Costs(1.56, 28, 22, 74, 5.0e7), "ndhwc": Costs(1.35, 11, 1, 93, 6.0e7)},
    ("dense", "grad_weight"): {"ncdhw": Costs(1.56, 110, 15, 45, 5.0e7), "ndhwc": Costs(1.3, 86, 0, 225, 5.0e7)},
    ("few channels", "forward"): {
        "ncdhw": Costs(0.34, 197, 0, 8800, 5.0e7),
        "ndhwc": Costs(0.06, 256, 23, 4200, 5.0e7),
    },
    ("few channels", "grad_input"): {"ncdhw": Costs(1.89, 6, 0, 0, 5.0e7), "ndhwc": Costs(0.03, 0, 308, 8000, 5.0e7)},
    ("few channels", "grad_weight"): {"ncdhw": Costs(0.1, 384, 60, 0, 5.0e7), "ndhwc": Costs(0, 252, 47, 1100, 5.0e7)},
    ("strided", "forward"): {"ncdhw": Costs(1.65, 40, 0, 77, 2.2e8), "ndhwc": Costs(1.36, 0, 10, 49, 7.0e7)},
    ("strided", "grad_input"): {"ncdhw": Costs(1.89, 286, 0, 31, 5.0e7), "ndhwc": Costs(1.5, 20, 2, 61, 7.0e7)},
    ("strided", "grad_weight"): {"ncdhw": Costs(2.06, 93, 0, 47, 5.0e7), "ndhwc": Costs(1.96, 13, 0, 95, 6.0e7)},
    ("touching", "forward"): {"ncdhw": Costs(2.4, 25, 0, 0, 5.0e7), "ndhwc": Costs(1.18, 8, 9, 0, 5.0e7)},
    ("touching", "grad_input"): {"ncdhw": Costs(2.8, 246, 0, 0, 5.0e7), "ndhwc": Costs(1.2, 30, 0, 0, 5.0e7)},
    ("touching", "grad_weight"): {"ncdhw": Costs(2.8, 42, 0, 0, 5.0e7), "ndhwc": Costs(2.8, 0, 0, 0, 5.0e7)},
}


DEPTHWISE_COSTS: dict[Pass, dict[Layout, Costs]] = {
    "forward": {"ncdhw": Costs(7.4, 50, 150, 0, 0), "ndhwc": Costs(1.6, 32, 4, 0, 3.0e7)},
    "grad_input": {"ncdhw": Costs(95, 60, 80, 0, 9.0e8), "ndhwc": Costs(27, 60, 0, 0, 9.5e8)},
    "grad_weight": {"ncdhw": Costs(130, 80, 150, 0, 0), "ndhwc": Costs(10, 150, 650, 0, 0)},
}
"""Without rounding to vectors; gradients run in loops over groups."""

GROUPED_COSTS: dict[Pass, dict[Layout, Costs]] = {
    "forward": {"ncdhw": Costs(6, 30, 30, 0, 0), "ndhwc": Costs(4.3, 20, 20, 0, 0)},
    "grad_input": {"ncdhw": Costs(6, 30, 30, 0, 0), "ndhwc": Costs(5, 20, 20, 0, 0)},
    "grad_weight": {"ncdhw": Costs(30, 0, 0, 0, 0), "ndhwc": Costs(10.5, 0, 0, 0, 0)},
}
"""The same of groups of several channels (of four, where they were measured)."""


def kind_of(problem: ConvProblem) -> Kind:
    """The kernels of oneDNN that compute a problem, by how their time grows."""
    if problem.kernel_size == (1, 1, 1) == problem.stride:
        return "pointwise"
    if problem.kernel_size == problem.stride:
        return "touching"
    if max(problem.stride) > 1:
        return "strided"
    return "few channels" if min(problem.in_channels, problem.out_channels) < 16 else "dense"


def expected_time(problem: ConvProblem, pass_: Pass, inside_share: float) -> float:
    """Of a pass without groups; `inside_share` of its products have an input voxel that is not padding."""
    kind = kind_of(problem)
    cost = COSTS[kind, pass_][problem.layout]
    used = math.prod(used_share(count, 16) for count in (problem.in_channels, problem.out_channels))
    flops = inside_share * problem.flops(pass_) / used
    if pass_ == "grad_weight" and kind == "dense" and max(problem.dilation) > 1:
        flops *= 3 if problem.layout == "ncdhw" else 1.5
    return summed(problem, cost, flops)


def grouped_time(problem: ConvProblem, pass_: Pass) -> float:
    """Of a pass with groups."""
    depthwise = problem.groups in (problem.in_channels, problem.out_channels)
    cost = (DEPTHWISE_COSTS if depthwise else GROUPED_COSTS)[pass_][problem.layout]
    return summed(problem, cost, problem.flops(pass_))
