"""Speed and error of the schemes of `cpp.winograd` and `cpp.amx`: `python benchmarks/winograd_schemes.py`.

One process, float32, all candidates in turns, pages kept. GF/s count the FLOPs of direct convolution, so a scheme may
exceed the FMA peak; the error is the largest difference from float64 over the largest exact value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyvolconv
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.cpp import kernels, plan_of
from pyvolconv.backends.cpp_winograd import SCHEMES
from pyvolconv.problem import LAYOUTS, ConvProblem

PROBLEMS = (
    "n32ic16oc24-i15x15x30-k3-p1",
    "n32ic24oc32-i8x8x15-k3-p1",
    "n2ic32oc32-i64-k3-p1",
    "n2ic64oc64-i32-k3-p1",
    "n2ic128oc128-i16-k3-p1",
)


def candidates(problem: ConvProblem, x: Tensor, weight: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> the forward pass, which returns its result."""
    plan, compiled = plan_of(problem), kernels()

    def direct() -> Tensor:
        compiled.forward(plan, x.data_ptr(), weight.data_ptr(), 0, y.data_ptr())
        return y

    def winograd(outputs: tuple[int, int, int]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            compiled.winograd_forward(plan, outputs, x.data_ptr(), weight.data_ptr(), 0, y.data_ptr())
            return y

        return run

    def parts(count: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            compiled.split_forward(plan, count, False, x.data_ptr(), weight.data_ptr(), 0, y.data_ptr())
            return y

        return run

    schemes = {f"F({'x'.join(map(str, o))})": winograd(o) for o in SCHEMES[problem.kernel_size]["high"]}
    if compiled.has_matrix_unit():
        schemes |= {f"{count} parts": parts(count) for count in (3, 2)}
    return {"torch": lambda: torch.conv3d(x, weight, padding=1), "direct": direct} | schemes


def row(problem: ConvProblem, rounds: int) -> list[str]:
    """GF/s and error of each candidate."""
    memory_format = MEMORY_FORMAT[problem.layout]
    x, weight = (
        torch.randn(shape).contiguous(memory_format=memory_format)
        for shape in (problem.input_shape, problem.weight_shape)
    )
    y = torch.empty(problem.output_shape).contiguous(memory_format=memory_format)
    exact = torch.conv3d(x.double(), weight.double(), padding=1)
    runs = candidates(problem, x, weight, y)
    errors = {name: float((run() - exact).abs().max() / exact.abs().max()) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    speed = {name: problem.flops("forward") / 1e9 / statistics.median(times) for name, times in seconds.items()}
    return [f"{speed[name]:.0f} ({errors[name]:.1e})" for name in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each candidate (default 9)")
    rounds = parser.parse_args().rounds
    pyvolconv.keep_pages()
    peak = kernels().measure_fma_peak() / 1e9
    title = f"GF/s (error); {kernels().current_isa()}, {torch.get_num_threads()} threads, FMA peak {peak:.0f} GF/s"
    names = ["torch", "direct", *(f"F({'x'.join(map(str, outputs))})" for outputs in SCHEMES[3, 3, 3]["high"])]
    if kernels().has_matrix_unit():
        names += ["3 parts", "2 parts"]
    table = Table("problem", "layout", *names, title=title)
    for text in PROBLEMS:
        for layout in LAYOUTS:
            table.add_row(text, layout, *row(ConvProblem.parse(f"cpu-float32-{layout}-{text}"), rounds))
    Console(width=150).print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        main()
