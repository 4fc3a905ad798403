"""The training step of the 3-D CNN and of the LSTM, torch beside pyvolconv: `python benchmarks/training_step.py`.

One process, float32, equal threads. First torch alone with the allocator as it comes (pages returned), then
all candidates in turns with pages kept. Prints medians and the ratios that docs/performance.md quotes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import pyvolconv
from pyvolconv.cost.machine import measure_machine
from pyvolconv.cost.timing import Timing, alternate
from pyvolconv.train.loop import make_optimizer, training_step
from pyvolconv.train.models import build

FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def make_step(name: str, memory_format: torch.memory_format, ours: bool, batch: int) -> Callable[[], object]:
    """A closure that runs one optimiser step of a network on a fixed random batch."""
    torch.manual_seed(0)
    model = build(name)
    x, y = torch.randn(batch, 29, 30, 60), torch.randint(2, (batch,))
    if name == "cnn":
        model = model.to(memory_format=memory_format)
    if ours:
        pyvolconv.accelerate(model)
    optimizer = make_optimizer(model)
    return lambda: training_step(model, optimizer, x, y)


def main() -> None:
    """Measure, then print one row per candidate and allocator state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="samples per step (default 32)")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each candidate (default 11)")
    arguments = parser.parse_args()
    torch_steps = {
        f"torch {label}": make_step("cnn", layout, False, arguments.batch) for label, layout in FORMATS.items()
    }
    returned = alternate(torch_steps, rounds=arguments.rounds, warmup=2)
    pyvolconv.keep_pages()
    steps = {
        **torch_steps,
        **{f"pyvolconv {label}": make_step("cnn", layout, True, arguments.batch) for label, layout in FORMATS.items()},
        "LSTM": make_step("lstm", torch.contiguous_format, False, arguments.batch),
    }
    kept = alternate(steps, rounds=arguments.rounds, warmup=2)
    report(returned, kept, arguments.batch)


def report(returned: dict[str, Timing], kept: dict[str, Timing], batch: int) -> None:
    """Print the table and the ratios."""
    machine = measure_machine()
    table = Table(
        title=f"Training step, batch {batch}, {torch.get_num_threads()} threads, {machine.cpu} ({machine.isa})"
    )
    for column in ("candidate", "pages", "median ms", "fastest ms"):
        table.add_column(column, justify="left" if column in ("candidate", "pages") else "right")
    for state, timings in (("returned", returned), ("kept", kept)):
        for name, timing in timings.items():
            table.add_row(name, state, f"{timing.median * 1e3:.1f}", f"{timing.min * 1e3:.1f}")
    console = Console()
    console.print(table)
    ours = min(kept[f"pyvolconv {label}"].median for label in FORMATS)
    best = min(kept[f"torch {label}"].median for label in FORMATS)
    console.print(f"torch's better layout, pages kept, over ours, pages kept: {best / ours:.2f}x")
    console.print(
        f"torch contiguous as it comes over ours, pages kept: {returned['torch contiguous'].median / ours:.2f}x"
    )
    console.print(f"CNN of ours over LSTM, pages kept: {ours / kept['LSTM'].median:.1f}x")


if __name__ == "__main__":
    main()
