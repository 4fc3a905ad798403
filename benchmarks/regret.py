"""What the cost model loses against a measured choice: `python -m benchmarks.regret`.

For each problem, layout and pass of the sets in problems.py all backends that may be chosen are timed in turns, torch
included, pages kept. Regret is the time of the cost model's choice over the time of the fastest. "untuned" and "tuned"
are how many times faster than torch in its better layout the two choices are.

`--networks PARTS` takes the layers of whole networks (networks.py), each once, in place of the sets.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.autotune import Tuned, geometric_mean, time_pass
from pyvolconv.cost.machine import measure_machine
from pyvolconv.problem import LAYOUTS, PASSES, Layout

from .networks import NETWORKS, inference
from .problems import PROBLEM_SETS
from .problems import problem as named_problem

Row = tuple[str, Layout, Tuned, float]
"""Name, layout, times, and milliseconds of torch in its better layout."""


def layers_of(parts: str) -> dict[str, str]:
    """The convolutions that one inference of the networks asks for, by the text that says their sizes."""
    texts: set[str] = set()
    for name, make in NETWORKS.items():
        if any(part in name for part in parts.split(",")):
            network = make()
            pyvolconv.accelerate(network.model)
            with dispatch.listen() as asked:
                inference(network)()
            texts |= {str(problem.without_epilogue()).split("-", 3)[3] for problem, _ in asked}
    return {text: text for text in sorted(texts)}


def measured(names: dict[str, str], dtype: str, seconds: float, longest: float) -> Iterator[Row]:
    """Every problem and pass in both layouts; without those that take torch's half of the peak more than `longest`."""
    peak = measure_machine().peak_flops
    for (name, text), pass_ in itertools.product(names.items(), PASSES):
        problems = {layout: named_problem(text, layout, dtype, "cpu") for layout in LAYOUTS}
        if problems["ncdhw"].flops(pass_) / (0.5 * peak) > longest:
            continue
        found = {layout: time_pass(problem, pass_, seconds) for layout, problem in problems.items()}
        torch_times = [one.milliseconds["aten"] for one in found.values() if one and "aten" in one.milliseconds]
        for layout, one in found.items():
            if one is not None:
                yield name, layout, one, min(torch_times)


def print_rows(console: Console, rows: list[Row], every: bool) -> None:
    """Rows with a regret of more than 5 % or slower than torch, worst first, and the means over all of them."""
    table = Table(title_justify="left", header_style="dim", box=None, padding=(0, 1))
    for column in ("problem", "pass", "layout", "chosen", "fastest"):
        table.add_column(column, no_wrap=True)
    for column in ("chosen ms", "fastest ms", "regret", "untuned", "tuned"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layout, one, torch_time in sorted(rows, key=lambda row: -(row[2].regret or 0)):
        chosen = one.milliseconds.get(one.expected)
        if chosen is None or (not every and chosen <= 1.05 * one.best and chosen <= torch_time):
            continue
        ratios = (f"{ratio:.2f}" for ratio in (one.regret or 1.0, torch_time / chosen, torch_time / one.best))
        times = (f"{time:.3g}" for time in (chosen, one.best))
        table.add_row(name, one.pass_, layout, one.expected, one.winner, *times, *ratios)
    console.print(table)
    regret = geometric_mean(one.regret for _, _, one, _ in rows)
    worst = max(one.regret or 1.0 for _, _, one, _ in rows)
    known = [(one, torch_time) for _, _, one, torch_time in rows if one.expected in one.milliseconds]
    untuned = geometric_mean(torch_time / one.milliseconds[one.expected] for one, torch_time in known)
    tuned = geometric_mean(torch_time / one.best for one, torch_time in known)
    console.print(
        f"{len(rows)} passes: regret {regret:.3f} in the geometric mean, {worst:.2f} at worst; "
        f"over torch's better layout untuned {untuned:.2f}x, tuned {tuned:.2f}x"
    )


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default="mission,suite", help="comma-separated sets or names of entries")
    parser.add_argument("--networks", help="comma-separated parts of networks' names, whose layers are taken instead")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=0.3, help="per pass, problem and layout (default 0.3)")
    parser.add_argument("--longest", type=float, default=0.3, help="leave out what takes torch longer (default 0.3 s)")
    parser.add_argument("--high", action="store_true", help='with set_precision("high")')
    parser.add_argument("--every", action="store_true", help="print every row, also where the choice was right")
    options = parser.parse_args()
    pyvolconv.keep_pages()
    if options.high:
        pyvolconv.set_precision("high")
    entries = {name: text for entry_set in PROBLEM_SETS.values() for name, text in entry_set.items()}
    names: dict[str, str] = layers_of(options.networks) if options.networks else {}
    for word in () if options.networks else options.problems.split(","):
        names |= PROBLEM_SETS.get(word) or {word: entries.get(word, word)}
    rows = list(measured(names, options.dtype, options.seconds, options.longest))
    if rows:
        print_rows(Console(width=130), rows, options.every)


if __name__ == "__main__":
    with torch.no_grad():
        main()
