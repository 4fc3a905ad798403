"""The mission's fused passes one by one: `python benchmarks/fused_passes.py`.

For each of the CNN's three convolutions with ReLU and 2x2x2 max-pool, batch 32, float32: the time of the forward pass,
directly, by Winograd and by the first layer's kernel, and of the two sparse gradients, beside the multiplications that
each needs at the machine's measured floating-point peak. The gradients are random, none zero: a step of training has
some zeros behind the ReLU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import pyvolconv
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.registry import select
from pyvolconv.cost.machine import measure_machine
from pyvolconv.cost.timing import alternate
from pyvolconv.problem import LAYOUTS, ConvProblem

LAYERS = ("n32ic1oc16-i29x30x60", "n32ic16oc24-i15x15x30", "n32ic24oc32-i8x8x15")


def passes_of(problem: ConvProblem) -> dict[str, tuple[Callable[[], object], int]]:
    """Each pass of a fused problem as a closure over random tensors, and the FLOPs it cannot do without."""
    memory_format = MEMORY_FORMAT[problem.layout]

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape).contiguous(memory_format=memory_format)

    x, weight, bias = draw(problem.input_shape), draw(problem.weight_shape), torch.randn(problem.out_channels)
    grad = draw(problem.pooled_shape)
    direct, winograd, first = (select(name)[0] for name in ("cpp.direct", "cpp.winograd", "cpp.first_layer"))
    _, code = direct.forward_max_pool(problem, x, weight, bias)
    dense, sparse = problem.flops("forward"), problem.flops("grad_weight")
    passes: dict[str, tuple[Callable[[], object], int]] = {
        "forward": (lambda: direct.forward_max_pool(problem, x, weight, bias), dense),
        "grad_weight": (lambda: direct.grad_weight_max_pool(problem, grad, code, x), sparse),
    }
    if not first.unsupported_reasons(problem, "forward"):
        passes["forward, first layer"] = (lambda: first.forward_max_pool(problem, x, weight, bias), dense)
    if problem.in_channels > 1:
        passes["forward, Winograd"] = (lambda: winograd.forward_max_pool(problem, x, weight, bias), dense)
        passes["grad_input"] = (lambda: direct.grad_input_max_pool(problem, grad, code, weight), sparse)
    return passes


def main() -> None:
    """Measure, then print one row per pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed runs of each pass (default 11)")
    rounds = parser.parse_args().rounds
    pyvolconv.keep_pages()
    machine = measure_machine()
    where = f"{machine.threads} threads, {machine.cpu} ({machine.isa}), FMA peak {machine.peak_flops / 1e9:.0f} GF/s"
    table = Table(title=f"The CNN's fused passes, batch 32, {where}")
    for column in ("problem", "layout", "pass"):
        table.add_column(column)
    for column in ("median ms", "fastest ms", "FMA floor ms"):
        table.add_column(column, justify="right")
    for text in LAYERS:
        for layout in LAYOUTS:
            problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}-k3-p1-bias-relu-pool2ceil")
            passes = passes_of(problem)
            timings = alternate({name: run for name, (run, _) in passes.items()}, rounds=rounds)
            for name, timing in timings.items():
                floor = passes[name][1] / machine.peak_flops
                milliseconds = (f"{seconds * 1e3:.2f}" for seconds in (timing.median, timing.min, floor))
                table.add_row(text, layout, name, *milliseconds)
    Console(width=120).print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        main()
