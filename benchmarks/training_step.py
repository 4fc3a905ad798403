"""The CNN's step, torch beside pyvolconv, and the LSTM's: `python benchmarks/training_step.py`.

One process, float32, equal threads. All candidates take turns, first with the allocator as it comes (pages returned),
then with pages kept. Prints medians, page faults and extra memory of a step, and the ratios that
docs/performance.md quotes. `--inference` times the forward pass without gradients instead of the training step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

import pyvolconv
from pyvolconv.cost.machine import measure_machine
from pyvolconv.cost.pages import measure_memory, page_faults
from pyvolconv.cost.timing import Timing, alternate
from pyvolconv.train.loop import make_optimizer, training_step
from pyvolconv.train.models import build

FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
Step = Callable[[], object]


def make_step(name: str, how: str, memory_format: torch.memory_format, batch: int, inference: bool) -> Step:
    """A closure that runs one step of a network on a fixed random batch.

    `how` is "torch", "compile" (torch.compile), "direct" (accelerate without fusion) or "fused" (accelerate).
    """
    torch.manual_seed(0)
    model = build(name)
    x, y = torch.randn(batch, 1, 29, 30, 60), torch.randint(2, (batch,))
    if name == "cnn":
        model, x = model.to(memory_format=memory_format), x.to(memory_format=memory_format)
    optimizer = make_optimizer(model)
    if how in ("direct", "fused"):
        pyvolconv.accelerate(model, fuse=how == "fused")
    if how == "compile":
        model = torch.compile(model)
    if inference:
        model.eval()
        return torch.no_grad()(lambda: model(x))
    return lambda: training_step(model, optimizer, x, y)


def main() -> None:
    """Measure, then print one row per candidate and allocator state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="samples per step (default 32)")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each candidate (default 11)")
    parser.add_argument("--inference", action="store_true", help="the forward pass alone, without gradients")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (about a minute longer)")
    arguments = parser.parse_args()
    ways = ("torch", "compile", "direct", "fused") if arguments.compile else ("torch", "direct", "fused")
    steps = {
        f"{how} {label}": make_step("cnn", how, FORMATS[label], arguments.batch, arguments.inference)
        for how, label in product(ways, FORMATS)
    }
    steps["LSTM"] = make_step("lstm", "torch", torch.contiguous_format, arguments.batch, arguments.inference)
    returned = alternate(steps, rounds=arguments.rounds, warmup=2)
    memory = {name: measure_memory(step).added_rss_bytes for name, step in steps.items()}
    pyvolconv.keep_pages()
    kept = alternate(steps, rounds=arguments.rounds, warmup=2)
    faults = {name: _faults(step) for name, step in steps.items()}
    _report(arguments, returned, kept, faults, memory)


def _faults(step: Step) -> int:
    before = page_faults()
    step()
    return page_faults() - before


def _report(
    arguments: argparse.Namespace,
    returned: dict[str, Timing],
    kept: dict[str, Timing],
    faults: dict[str, int],
    memory: dict[str, int],
) -> None:
    machine = measure_machine()
    what = "Inference" if arguments.inference else "Training step"
    where = f"{torch.get_num_threads()} threads, {machine.cpu} ({machine.isa})"
    table = Table(title=f"{what}, batch {arguments.batch}, {where}")
    for column in ("candidate", "pages"):
        table.add_column(column)
    for column in ("median ms", "fastest ms", "page faults", "extra MB"):
        table.add_column(column, justify="right")
    for state, timings in (("returned", returned), ("kept", kept)):
        for name, timing in timings.items():
            extra = f"{memory[name] / 1e6:.0f}" if state == "returned" else ""
            fault = f"{faults[name]:,}" if state == "kept" else ""
            table.add_row(name, state, f"{timing.median * 1e3:.1f}", f"{timing.min * 1e3:.1f}", fault, extra)
    console = Console()
    console.print(table)

    def best(way: str) -> float:
        return min(timing.median for name, timing in kept.items() if name.startswith(way))

    ours = min(best("direct"), best("fused"))
    ratios = {
        "torch contiguous as it comes over ours": returned["torch contiguous"].median / ours,
        "torch channels_last_3d as it comes over ours": returned["torch channels_last_3d"].median / ours,
        "torch's better layout, pages kept for both, over ours": best("torch") / ours,
        "the same over ours without fusion": best("torch") / best("direct"),
        "CNN of ours over LSTM, pages kept": ours / kept["LSTM"].median,
    }
    if arguments.compile:
        ratios["torch.compile's better layout, pages kept for both, over ours"] = best("compile") / ours
    for words, ratio in ratios.items():
        console.print(f"{words}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
