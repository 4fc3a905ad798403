"""Our convolutions beside cuDNN's on one GPU: `python -m benchmarks.gpu_suite --json results.json`.

For each entry of gpu_problems.py and each pass, in both layouts: what the dispatcher takes among our own backends, and
torch with cudnn.benchmark on. Each of our results is checked first (gpu_check.py); a wrong one has no speed. Then all
are timed in turns by events, on operands that no cache holds. "ratio" is torch's time in its better layout over ours in
our better one; "ncdhw" is the same for tensors that come and go in ncdhw; "+aten" is what a user gets, for whom the
dispatcher may also take torch. A layout that is hopelessly slower in a first call is not timed further, and torch is
first asked for a part of a problem of a kind that is known to take it seconds.

Rows are printed and written as they come. What `--limit` leaves no time for is named at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvolconv import dispatch, tuned
from pyvolconv.backends.base import MEMORY_FORMAT, Backend, operand_shapes
from pyvolconv.candidates import competitors
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Layout, Pass

from .gpu_check import Reference, poisoned, relative_difference
from .gpu_compile import Job, compile_all, job
from .gpu_problems import GPU_PROBLEMS, gpu_problem
from .gpu_rows import Row, Time, summary, table, to_json
from .gpu_timing import Runner, matmul_rates, operand_sets, time_in_turns

LEFT_OUT = 2.5
"""A layout this much slower than its side's better one in its second call is not timed further."""
PART = 256
"""Samples of a larger batch that torch is first asked for."""
SEARCH_SECONDS = 0.1
"""cudnn.benchmark runs every algorithm there is: not where one call is expected to take longer."""
LONGEST_SECONDS = 2.0
"""Torch is not asked for the whole of a problem that is expected to take it longer, by the time of a part."""


def ours(problem: ConvProblem, pass_: Pass) -> list[Backend]:
    """Those of our backends that may be chosen, the one first that is."""
    able = [backend for backend in dispatch.able_backends(problem, pass_) if backend.ours]
    return [dispatch.fastest(problem, pass_, able)] if able else []


def all_of_ours(problem: ConvProblem, pass_: Pass) -> list[Backend]:
    """All of our backends that tuning would time, in all their configurations."""
    able = [backend for backend in dispatch.able_backends(problem, pass_) if backend.ours]
    return competitors(problem, pass_, able, dispatch.expected_fastest(problem, pass_, able)) if able else []


def operands_of(problem: ConvProblem, pass_: Pass) -> list[Tensor]:
    dtype = getattr(torch, problem.dtype)
    shapes = operand_shapes(problem, pass_)
    return [_ordered(torch.randn(shape, device=problem.device, dtype=dtype), problem.layout) for shape in shapes]


def _ordered(values: Tensor, layout: Layout) -> Tensor:
    # Not contiguous(): of one channel that keeps strides which name the other layout.
    return torch.empty_like(values, memory_format=MEMORY_FORMAT[layout]).copy_(values)


class Ours:
    """A pass as the package's operators call its backend."""

    def __init__(self, backend: Backend, problem: ConvProblem, pass_: Pass) -> None:
        self.backend, self.problem, self.pass_ = backend, problem, pass_

    def __call__(self, *operands: Tensor) -> Tensor:
        rest = (None,) if self.pass_ == "forward" else ()
        return dispatch.run(getattr(self.backend, self.pass_), self.problem, self.pass_, *operands, *rest)


class Torch:
    """A pass as torch's users call it, or autograd for them."""

    def __init__(self, problem: ConvProblem, pass_: Pass) -> None:
        self.problem, self.pass_ = problem, pass_
        shape = problem.input_shape if pass_ == "grad_input" else problem.weight_shape
        dtype = getattr(torch, problem.dtype)
        # Of the operand whose gradient is asked for only sizes and strides are read.
        self.target = _ordered(torch.empty(shape, device=problem.device, dtype=dtype), problem.layout)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        problem = self.problem
        stride, dilation, groups = problem.stride, problem.dilation, problem.groups
        padding = [begin for begin, _ in problem.padding]
        if self.pass_ == "forward":
            return F.conv3d(first, second, None, stride, padding, dilation, groups)
        wanted = self.pass_ == "grad_weight"
        x, weight = (second, self.target) if wanted else (self.target, second)
        mask = (not wanted, wanted, False)
        gradients = torch.ops.aten.convolution_backward(
            first, x, weight, None, stride, padding, dilation, False, [0, 0, 0], groups, mask
        )
        result: Tensor = gradients[wanted]
        return result


def part_of(problem: ConvProblem) -> ConvProblem | None:
    """A smaller problem of a kind that has been seen to take torch seconds; None for the others."""
    if problem.batch > PART:
        return problem.with_(batch=PART)
    if problem.groups > 1:
        return problem.with_(
            input_size=(max(problem.kernel_size[0], problem.input_size[0] // 4), *problem.input_size[1:])
        )
    return None


def expected_seconds(problem: ConvProblem, pass_: Pass) -> float:
    """What torch is expected to take for the whole, by the time of a part."""
    part = part_of(problem)
    if part is None:
        return 0.0
    torch.backends.cudnn.benchmark = False
    runner = Runner(Torch(part, pass_), [operands_of(part, pass_)])
    runner.start()
    return runner.once * problem.flops(pass_) / part.flops(pass_)


class Measurement:
    """One pass of one entry: check, then time."""

    def __init__(self, name: str, pass_: Pass, rate: float, seconds: float, every: bool, device: str) -> None:
        plain = gpu_problem(name, "ncdhw", device)
        self.plain, self.pass_, self.seconds, self.every = plain, pass_, seconds, every
        self.row = Row(name, pass_, str(plain), plain.flops(pass_), plain.min_bytes(pass_), rate)

    def run(self) -> Row:
        operands = operands_of(self.plain, self.pass_)
        reference = Reference(self.plain, self.pass_, operands)
        results: dict[Layout, Tensor] = {}
        runners: dict[tuple[Layout, str], Runner] = {}
        for layout in LAYOUTS:
            problem = self.plain.with_(layout=layout)
            sets = operand_sets([_ordered(operand, layout) for operand in operands])
            for backend in all_of_ours(problem, self.pass_) if self.every else ours(problem, self.pass_):
                result = self._ours(backend, problem, sets, reference, runners)
                if result is not None:
                    results[layout] = result
            self._torch(problem, sets, results, runners)
        del operands, reference, results
        self._leave_out(runners)
        time_in_turns(list(runners.values()), self.seconds)
        self._fill(runners)
        return self.row

    def _ours(
        self,
        backend: Backend,
        problem: ConvProblem,
        sets: list[list[Tensor]],
        reference: Reference,
        runners: dict[tuple[Layout, str], Runner],
    ) -> Tensor | None:
        call = Ours(backend, problem, self.pass_)
        layout = problem.layout
        try:
            with poisoned():
                result = call(*sets[0])
            error = reference.error(result, backend.accuracy(problem, self.pass_))
            same = torch.equal(result, call(*sets[0]))
            runner = Runner(call, sets)
            runner.start()
        except (RuntimeError, MemoryError) as reason:
            self.row.failures.append(f"{backend.label} {layout}: {reason.__cause__ or reason}")
            return None
        self.row.error[layout] = max(error, self.row.error.get(layout, 0.0))
        self.row.reproducible[layout] = same and self.row.reproducible.get(layout, True)
        if error > 1:
            self.row.failures.append(f"{backend.label} {layout}: {error:.3g} times its bound")
            return None
        runners[layout, backend.label] = runner
        return result

    def _torch(
        self,
        problem: ConvProblem,
        sets: list[list[Tensor]],
        results: dict[Layout, Tensor],
        runners: dict[tuple[Layout, str], Runner],
    ) -> None:
        layout = problem.layout
        try:
            expected = expected_seconds(problem, self.pass_)
            if expected > LONGEST_SECONDS:
                self.row.torch[layout] = Time(expected, "aten", "expected, by a part of it")
                return
            torch.backends.cudnn.benchmark = expected < SEARCH_SECONDS
            runner = Runner(Torch(problem, self.pass_), sets)
            result = runner.start()
        except RuntimeError as reason:
            self.row.failures.append(f"torch {layout}: {reason}")
            return
        runners[layout, "aten"] = runner
        if layout in results:
            self.row.difference[layout] = relative_difference(results.pop(layout), result)

    def _leave_out(self, runners: dict[tuple[Layout, str], Runner]) -> None:
        """Those that are hopelessly slower than the best of their side keep the time of their second call."""
        for side in (True, False):
            best = min((runner.once for (_, who), runner in runners.items() if (who != "aten") is side), default=0.0)
            for (layout, who), runner in list(runners.items()):
                if (who != "aten") is side and runner.once > max(LEFT_OUT * best, best + 2e-4):
                    del runners[layout, who]
                    self._note(layout, who, Time(runner.once, who, "one call"))

    def _fill(self, runners: dict[tuple[Layout, str], Runner]) -> None:
        for (layout, who), runner in runners.items():
            self._note(layout, who, Time(runner.seconds, who))
        for layout in LAYOUTS:
            problem = self.plain.with_(layout=layout)
            if self.every and layout in self.row.configurations:
                times = {who: 1e3 * seconds for who, seconds in self.row.configurations[layout].items()}
                tuned.remember({(problem, self.pass_): times})
                dispatch.forget_choices()
            backend = dispatch.choose_or_none(problem, self.pass_)
            self.row.chosen[layout] = "none" if backend is None else backend.label

    def _note(self, layout: Layout, who: str, one: Time) -> None:
        side = self.row.torch if who == "aten" else self.row.ours
        if layout not in side or one.seconds < side[layout].seconds:
            side[layout] = one
        if self.every:
            self.row.configurations.setdefault(layout, {})[who] = one.seconds


def measure_all(
    wanted: list[tuple[str, Pass]], deadline: float, seconds: float, every: bool, device: str = "cuda", side: int = 8192
) -> Iterator[Row]:
    """The rows that there is time for."""
    rates = matmul_rates(side, device)
    print(
        "matrix products: " + ", ".join(f"{dtype} {rate / 1e12:.0f} TF/s" for dtype, rate in rates.items()), flush=True
    )
    for name, pass_ in wanted:
        if time.monotonic() > deadline:
            return
        torch.manual_seed(0)
        rate = rates[gpu_problem(name, "ncdhw").dtype]
        measurement = Measurement(name, pass_, rate, seconds, every, device)
        try:
            row = measurement.run()
        except RuntimeError as reason:
            # Out of memory above all: the others can still be measured.
            row = measurement.row
            row.failures.append(f"{type(reason).__name__}: {reason}")
        print(row, flush=True)
        yield row
        if device == "cuda":
            torch.cuda.empty_cache()


def jobs_of(wanted: list[tuple[str, Pass]], every: bool) -> list[Job]:
    problems = [(gpu_problem(name, layout), pass_) for name, pass_ in wanted for layout in LAYOUTS]
    backends = all_of_ours if every else ours
    return [
        job(backend, problem, pass_)
        for problem, pass_ in problems
        for backend in backends(problem, pass_)
        if type(backend).prepare is not Backend.prepare
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GPU_PROBLEMS), help="comma-separated entries (default: all)")
    parser.add_argument("--passes", default=",".join(PASSES), help="comma-separated passes (default: all)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timed calls per candidate (default 0.1)")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds in all, compilation included (200)")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices of the comparison (8192)")
    parser.add_argument("--configurations", action="store_true", help="time all that tuning times, keep the times")
    parser.add_argument("--json", type=Path, help="file to write the rows to, after each of them")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    if unknown := set(options.only.split(",")) - GPU_PROBLEMS.keys():
        parser.error(f"no entry {', '.join(sorted(unknown))}; there are: {', '.join(GPU_PROBLEMS)}")
    if unknown := set(options.passes.split(",")) - set(PASSES):
        parser.error(f"no pass {', '.join(sorted(unknown))}; there are: {', '.join(PASSES)}")
    begin = time.monotonic()
    wanted: list[tuple[str, Pass]] = [
        (name, pass_) for name in options.only.split(",") for pass_ in PASSES if pass_ in options.passes.split(",")
    ]
    jobs = jobs_of(wanted, options.configurations)
    failed = compile_all(jobs, options.limit / 2)
    print(f"compiled {len(jobs) - len(failed)} passes in {time.monotonic() - begin:.1f} s", flush=True)
    for one, reason in failed.items():
        print(f"not compiled: {one}: {reason.splitlines()[0]}", flush=True)
    facts: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }
    print(facts, flush=True)
    rows = []
    with torch.no_grad():
        for row in measure_all(
            wanted, begin + options.limit, options.seconds, options.configurations, side=options.matmul
        ):
            rows.append(row)
            if options.json:
                options.json.write_text(to_json(rows, facts))
    print(f"\n{time.monotonic() - begin:.0f} s")
    print(table(rows))
    print(summary(rows))
    left = wanted[len(rows) :]
    if left:
        print("not measured, no time: " + ", ".join(f"{name} {pass_}" for name, pass_ in left))


if __name__ == "__main__":
    main()
