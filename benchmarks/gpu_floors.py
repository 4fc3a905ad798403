"""What `benchmarks.gpu_suite` is expected to measure on a Hopper GPU, without one: `python -m benchmarks.gpu_floors`.

For each entry and pass the floor, which is FLOPs over the peak or least bytes over the bandwidth, whichever is longer,
and what the cost models of our backends and of torch expect, each in its better layout. A measurement that misses these
is what to look into.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from pyvolconv import dispatch
from pyvolconv.backends.cuda_peak import BYTES_PER_SECOND, PEAK, arithmetic
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Pass

from .gpu_problems import GPU_PROBLEMS, gpu_problem


@contextmanager
def hopper() -> Iterator[None]:
    """Backends are asked as on a Hopper GPU; nothing is run."""
    with mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_capability=lambda *device: (9, 0),
        is_bf16_supported=lambda **options: True,
    ):
        yield


def expected(problem: ConvProblem, pass_: Pass, *, ours: bool) -> tuple[float, str]:
    """Seconds, and of which backend."""
    able = [backend for backend in dispatch.able_backends(problem, pass_) if backend.ours is ours]
    backend = dispatch.expected_fastest(problem, pass_, able)
    share = backend.expected_efficiency(problem, pass_)
    return problem.flops(pass_) / (share * PEAK[arithmetic(problem)]), backend.name


def main() -> None:
    ratios = []
    print(f"{'entry':15} {'pass':11} {'floor':>9} {'ours':>9} {'torch':>9} us  torch/ours")
    with hopper():
        for name in GPU_PROBLEMS:
            for pass_ in PASSES:
                problems = [gpu_problem(name, layout) for layout in LAYOUTS]
                plain = problems[0]
                floor = max(
                    plain.flops(pass_) / PEAK[arithmetic(plain)],
                    plain.min_bytes(pass_) / BYTES_PER_SECOND,
                )
                mine, backend = min(expected(problem, pass_, ours=True) for problem in problems)
                peer, _ = min(expected(problem, pass_, ours=False) for problem in problems)
                ratios.append(peer / mine)
                cells = " ".join(f"{1e6 * seconds:9.1f}" for seconds in (floor, mine, peer))
                print(f"{name:15} {pass_:11} {cells}     {ratios[-1]:8.2f}  {backend}")
    print(f"geometric mean of {len(ratios)} expected ratios {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
