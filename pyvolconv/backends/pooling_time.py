"""How long torch takes for an activation and a max-pool behind a convolution on the CPU, in FLOPs at the FMA peak.

Fitted to measurements on a Sapphire Rapids (docs/performance.md): per value that is pooled, half a nanosecond in ndhwc
and 2 to 4 in ncdhw, by how many windows it is in; the code of chosen voxels takes 16 for each pooled value.
"""

from __future__ import annotations

import math

from ..host import starts_two_wide_fmas
from ..problem import ConvProblem

OF_A_CHOICE = 7800


def pooling_time(problem: ConvProblem, keeps_choices: bool) -> float:
    """Of a problem with a pool; `keeps_choices`: with the code that a backward pass needs."""
    assert problem.pool is not None
    windows = math.prod(
        window / stride for window, stride in zip(problem.pool.window, problem.pool.stride, strict=True)
    )
    of_a_value = 200 + 60 * windows if problem.layout == "ndhwc" else 440 + 560 * windows
    time = math.prod(problem.output_shape) * of_a_value
    if keeps_choices:
        time += math.prod(problem.pooled_shape) * OF_A_CHOICE
    return time if starts_two_wide_fmas() else time / 2
