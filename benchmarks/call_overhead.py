"""What a call costs besides the arithmetic: `python benchmarks/call_overhead.py`.

Convolutions of a few hundred multiplications, ours and torch's own in turns, median of many. What ours takes more is
argument handling, choosing, the autograd node and the call into the compiled part. The aim is 15 us or less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import pyvolconv

CALLS = 200


def cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> torch's call and ours."""
    x, weight, bias = torch.randn(1, 1, 4, 4, 4), torch.randn(1, 1, 3, 3, 3), torch.randn(1)
    parameter = weight.clone().requires_grad_()
    input_, grad = x.clone().requires_grad_(), torch.randn(1, 1, 2, 2, 2)
    theirs, ours = torch.nn.Conv3d(1, 1, 3), pyvolconv.Conv3d(1, 1, 3)

    def pooled(weight: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(F.relu(F.conv3d(x, weight, bias)), 2)

    def fused(weight: torch.Tensor) -> torch.Tensor:
        return pyvolconv.conv3d_max_pool(x, weight, bias, activation="relu")

    def step(function: Callable[..., torch.Tensor]) -> object:
        return torch.autograd.grad(function(input_, parameter), (input_, parameter), grad)

    return {
        "conv3d": (lambda: F.conv3d(x, weight), lambda: pyvolconv.conv3d(x, weight)),
        "conv3d, bias": (lambda: F.conv3d(x, weight, bias), lambda: pyvolconv.conv3d(x, weight, bias)),
        "conv3d, weight requires grad": (lambda: F.conv3d(x, parameter), lambda: pyvolconv.conv3d(x, parameter)),
        "conv3d, forward and both gradients": (lambda: step(F.conv3d), lambda: step(pyvolconv.conv3d)),
        "conv_transpose3d": (
            lambda: F.conv_transpose3d(x, weight, bias),
            lambda: pyvolconv.conv_transpose3d(x, weight, bias),
        ),
        "Conv3d, parameters": (lambda: theirs(x), lambda: ours(x)),
        "conv3d_max_pool; torch: conv, relu, pool": (lambda: pooled(weight), lambda: fused(weight)),
        "the same, weight requires grad": (lambda: pooled(parameter), lambda: fused(parameter)),
    }


def microseconds(step: Callable[[], object]) -> float:
    """Of one call, over a run of them."""
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Measure, then print one row per kind of call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="timed runs of 200 calls each (default 41)")
    rounds = parser.parse_args().rounds
    table = Table(title=f"Microseconds per call, {torch.get_num_threads()} threads", box=None, header_style="dim")
    table.add_column("call")
    for column in ("torch", "pyvolconv", "above torch"):
        table.add_column(column, justify="right")
    for name, (theirs, ours) in cases().items():
        for step in (theirs, ours):
            microseconds(step)
        pairs = [(microseconds(theirs), microseconds(ours)) for _ in range(rounds)]
        torch_median, our_median = (statistics.median(times) for times in zip(*pairs, strict=True))
        table.add_row(name, f"{torch_median:.1f}", f"{our_median:.1f}", f"{our_median - torch_median:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
