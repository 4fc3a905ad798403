"""Layers of real networks, what the dispatcher picks beside torch: `python -m benchmarks.suite`, with `--tuned` tuned.

One process, pages kept, all candidates in turns: both layouts of ours and of torch, each result checked before it is
timed. A ratio is the time of torch in its better layout over ours in our better layout, by medians. Operands are whole
numbers from -3 to 3, so results that are exact on integers must be torch's to the bit.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import pyvolconv
from pyvolconv import tuned
from pyvolconv.autotune import time_pass
from pyvolconv.backends.base import MEMORY_FORMAT, Backend, operand_shapes
from pyvolconv.backends.registry import select
from pyvolconv.dispatch import choose, forget_choices
from pyvolconv.precision import Precision
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Layout, Pass

from .problems import PROBLEM_SETS, problem

ENTRIES = PROBLEM_SETS["suite"] | PROBLEM_SETS["patches"]
MOST_ROUNDS = 200
LEFT_OUT = 1.5
"""A layout this much slower than its side's better one in the second call is not timed. First calls may be slow."""


@dataclass(frozen=True)
class Row:
    """One pass of one entry; times in milliseconds by layout, of those that were timed."""

    name: str
    pass_: Pass
    ours: dict[Layout, float]
    torch: dict[Layout, float]
    backend: dict[Layout, str]
    flops: int

    @property
    def ratio(self) -> float:
        return min(self.torch.values()) / min(self.ours.values())

    def __str__(self) -> str:
        layout = min(self.ours, key=self.ours.__getitem__)
        torch_layout = min(self.torch, key=self.torch.__getitem__)
        ours, peer = self.ours[layout], self.torch[torch_layout]
        return (
            f"{self.name:15} {self.pass_:11} {ours:9.2f} ms {self.flops / ours / 1e6:6.0f} GF/s {layout} "
            f"{self.backend[layout]:12}  torch {peer:9.2f} ms {torch_layout}  {self.ratio:6.2f}x"
        )


def run(backend: Backend, problem: ConvProblem, pass_: Pass, operands: list[Tensor]) -> Tensor:
    if pass_ == "forward":
        return backend.forward(problem, *operands, None)
    result: Tensor = getattr(backend, pass_)(problem, *operands)
    return result


def operands_of(problem: ConvProblem, pass_: Pass) -> list[Tensor]:
    shapes = operand_shapes(problem, pass_)
    return [torch.randint(-3, 4, shape, dtype=torch.int8).to(getattr(torch, problem.dtype)) for shape in shapes]


def check(result: Tensor, exact: Tensor, backend: Backend, problem: ConvProblem, pass_: Pass) -> None:
    """Sums are whole numbers that float32 holds; what rounds them to a narrow dtype rounds once."""
    if backend.accuracy(problem, pass_).exact_integers and backend.ours:
        if not torch.equal(result, exact.to(result.dtype)):
            raise SystemExit(f"{backend.name} is wrong: {pass_} of {problem}; a wrong result has no speed")
    else:
        rounder = max(1.0, backend.accuracy(problem, pass_).constant / 2)
        rtol = 0.02 if result.itemsize == 2 else 1e-4
        torch.testing.assert_close(result.float(), exact, rtol=rtol, atol=1e-5 * rounder * float(exact.abs().max()))


def tune(problem: ConvProblem, pass_: Pass, seconds: float) -> None:
    """Have this process take the fastest; nothing is kept."""
    one = time_pass(problem, pass_, seconds)
    if one is not None:
        tuned.remember({(problem, pass_): one.milliseconds}, keep=False)
        forget_choices()


def measure(name: str, pass_: Pass, dtype: str, seconds: float, tuned_first: bool) -> Row:
    """At least two rounds of all candidates, then more until `seconds` are over."""
    (aten,) = select("aten")
    plain = problem(ENTRIES[name], "ncdhw", dtype, "cpu")
    operands = operands_of(plain, pass_)
    exact = run(aten, plain.with_(dtype="float32"), pass_, [operand.float() for operand in operands])
    runs = {}
    trial: dict[tuple[bool, Layout], float] = {}
    backend: dict[Layout, str] = {}
    for layout in LAYOUTS:
        ordered = [operand.contiguous(memory_format=MEMORY_FORMAT[layout]) for operand in operands]
        laid = plain.with_(layout=layout)
        if tuned_first:
            tune(laid, pass_, seconds)
        chosen = choose(laid, pass_)
        backend[layout] = chosen.name
        for candidate, ours in ((chosen, True), (aten, False)):
            check(run(candidate, laid, pass_, ordered), exact, candidate, laid, pass_)
            begin = time.perf_counter()
            run(candidate, laid, pass_, ordered)
            trial[ours, layout] = time.perf_counter() - begin
            runs[ours, layout] = (candidate, laid, pass_, ordered)
    for side in (True, False):
        best = min(trial[side, layout] for layout in LAYOUTS)
        for layout in LAYOUTS:
            # A single call of less than 20 ms says little.
            if trial[side, layout] > max(LEFT_OUT * best, 0.02):
                del runs[side, layout]
    times: dict[tuple[bool, Layout], list[float]] = {key: [] for key in runs}
    # The second of two that have the same operands finds them in the cache: each is the second in every other round.
    orders = cycle(
        [[(ours, layout) for layout in LAYOUTS for ours in sides] for sides in ((True, False), (False, True))]
    )
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds == 0 or rounds % 2 or (rounds < MOST_ROUNDS and time.perf_counter() < stop):
        rounds += 1
        for key in next(orders):
            if key in runs:
                begin = time.perf_counter()
                run(*runs[key])
                times[key].append(1e3 * (time.perf_counter() - begin))
    medians = {key: statistics.median(several) for key, several in times.items()}
    return Row(
        name,
        pass_,
        {layout: value for (ours, layout), value in medians.items() if ours},
        {layout: value for (ours, layout), value in medians.items() if not ours},
        backend,
        plain.flops(pass_),
    )


def measure_all(names: list[str], passes: list[Pass], dtype: str, seconds: float, tuned_first: bool) -> Iterator[Row]:
    for name in names:
        for pass_ in passes:
            row = measure(name, pass_, dtype, seconds, tuned_first)
            print(row, flush=True)
            yield row


def summary(rows: list[Row]) -> str:
    """Geometric means and the slowest entries."""

    def mean(several: list[Row]) -> float:
        return math.exp(statistics.fmean(math.log(row.ratio) for row in several))

    lines = [f"geometric mean of {len(rows)} ratios {mean(rows):.2f}"]
    lines += [
        f"  {pass_:11} {mean(several):.2f}"
        for pass_ in PASSES
        if (several := [row for row in rows if row.pass_ == pass_])
    ]
    lines.append("worst")
    lines += [f"  {row}" for row in sorted(rows, key=lambda row: row.ratio)[:10]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="suite", choices=("suite", "patches"), help="of problems.py (default: suite)")
    parser.add_argument("--only", help="comma-separated entries (default: all of the set)")
    parser.add_argument("--passes", default=",".join(PASSES), help="comma-separated passes (default: all)")
    parser.add_argument("--dtype", default="float32", help="name of a torch dtype (default: float32)")
    parser.add_argument("--precision", default="default", choices=get_args(Precision), help="see set_precision")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed per entry and pass, at least two rounds (2)")
    parser.add_argument("--tuned", action="store_true", help="time all backends first, and take the fastest")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PROBLEM_SETS[options.set])
    passes = [pass_ for pass_ in PASSES if pass_ in options.passes.split(",")]
    torch.manual_seed(0)
    pyvolconv.set_precision(options.precision)
    with pyvolconv.keep_pages() as kept, torch.no_grad():
        pages = "kept" if kept.active else f"not kept ({kept.reason})"
        choice = "tuned" if options.tuned else "untuned"
        threads = torch.get_num_threads()
        print(f"{options.dtype}, {choice}, precision {options.precision}, {threads} threads, pages {pages}")
        rows = list(
            measure_all(
                names,
                passes,
                options.dtype,
                options.seconds,
                options.tuned,
            )
        )
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1))


if __name__ == "__main__":
    main()
