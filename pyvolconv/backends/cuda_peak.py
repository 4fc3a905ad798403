"""The scale of every cost model on CUDA: the GPU's peak in a problem's arithmetic, and what memory leaves of it.

The numbers are those of one Hopper GPU; on another one both change by about as much, and backends are only compared.
"""

from __future__ import annotations

from ..precision import float32_arithmetic
from ..problem import ConvProblem, Pass

PEAK = {"float16": 790e12, "bfloat16": 790e12, "tf32": 395e12, "float32": 60e12, "float64": 60e12}
"""FLOPs per second that large matrix products reach."""

BYTES_PER_SECOND = 4.3e12


def arithmetic(problem: ConvProblem) -> str:
    """In what the user lets convolutions of the problem's dtype compute, a key of `PEAK`."""
    if problem.dtype != "float32":
        return problem.dtype if problem.dtype in PEAK else "float64"
    return "tf32" if float32_arithmetic("cuda", "conv") == "tf32" else "float32"


def share_of_peak(
    problem: ConvProblem, pass_: Pass, reached: float, more_bytes: float = 0.0, call_seconds: float = 0.0
) -> float:
    """Expected FLOPs per second over the peak, which is what `Backend.expected_efficiency` returns.

    Args:
        problem, pass_: what is computed.
        reached: the share while no memory is waited for.
        more_bytes: what is moved besides `problem.min_bytes`.
        call_seconds: what a call takes on the host, which shows where the GPU has less to do.
    """
    at_peak = max(problem.flops(pass_), 1) / PEAK[arithmetic(problem)]
    seconds = at_peak / reached + (problem.min_bytes(pass_) + more_bytes) / BYTES_PER_SECOND
    return at_peak / max(seconds, call_seconds)


def share_of_products(problem: ConvProblem) -> float:
    """The peak of torch's matrix products over that of its convolutions, which may be allowed to round float32 more."""
    if problem.dtype != "float32" or float32_arithmetic("cuda", "matmul") != "ieee":
        return 1.0
    return PEAK["float32"] / PEAK[arithmetic(problem)]
