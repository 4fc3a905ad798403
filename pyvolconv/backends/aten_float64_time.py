"""How long torch's own float64 convolutions are expected to take on the CPU, in FLOPs of float32 at peak.

They write columns and multiply them by the BLAS, sample by sample; in ndhwc operands are copied before and results
after. Fitted to measurements of the suite on a Sapphire Rapids (docs/performance.md).
"""

from __future__ import annotations

import math

from ..problem import DTYPE_BYTES, ConvProblem, Layout, Pass
from .linear_time import Costs, summed

COSTS: dict[Pass, dict[Layout, Costs]] = {
    "forward": {"ncdhw": Costs(2.65, 8, 2.3, 69, 1e5), "ndhwc": Costs(2.6, 308, 45, 163, 1e5)},
    "grad_input": {"ncdhw": Costs(2.1, 32, 140, 340, 6e5), "ndhwc": Costs(2.8, 103, 351, 179, 6e5)},
    "grad_weight": {"ncdhw": Costs(2.3, 10, 19, 423, 1e5), "ndhwc": Costs(2.4, 342, 194, 367, 1e5)},
}

COLUMNS: dict[Pass, dict[Layout, float]] = {
    "forward": {"ncdhw": 71, "ndhwc": 61},
    "grad_input": {"ncdhw": 86, "ndhwc": 77},
    "grad_weight": {"ncdhw": 71, "ndhwc": 52},
}
"""Of a byte of the columns, which single taps with unit stride do without."""

GROUPED_SHARE = 0.004
"""Of peak, with groups: products of a few rows."""


def expected_time(problem: ConvProblem, pass_: Pass, cheap: bool) -> float:
    """Of a pass; `cheap` where two wide FMAs start per cycle, so that a byte takes the time of more of them."""
    if problem.groups > 1:
        return problem.flops(pass_) / GROUPED_SHARE
    cost, columns = COSTS[pass_][problem.layout], 0.0
    if problem.kernel_size != (1, 1, 1) or problem.stride != (1, 1, 1):
        values = problem.batch * math.prod(problem.output_size) * problem.reduction_length("forward")
        columns = COLUMNS[pass_][problem.layout] * DTYPE_BYTES["float64"] * values
    products = cost.flop * problem.flops(pass_)
    moved = summed(problem, cost, 0) + columns
    return products + (moved if cheap else 0.4 * moved)
