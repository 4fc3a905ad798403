"""The time of every pass of every problem, by every backend that can run it, torch in both layouts included.

Operands are whole numbers from -3 to 3. Every partial sum is then a whole number that the dtype of the sum
holds exactly, so a right result has the same bits in any order of summation, and each timed result is
compared to the bit with what torch computes from the same operands.
"""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pyvolconv.backends.base import MEMORY_FORMAT, Backend
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.cost.machine import Machine
from pyvolconv.problem import ConvProblem, Layout, Pass

from .problems import problem as named_problem

SECONDS_PER_RESULT = 1.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 50


def test_pass(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    record: dict[str, object],
    machine: Machine,
    name: str,
    text: str,
    pass_: Pass,
    backend: Backend,
    layout: Layout,
):
    option = request.config.getoption
    problem = named_problem(text, layout, option("dtype"), option("device"))
    reasons = backend.unsupported_reasons(problem, pass_)
    if reasons:
        pytest.skip(f"{backend.name}: {'; '.join(reasons)}")
    flops = problem.flops(pass_)
    expected = flops / (machine.peak_flops * backend.expected_efficiency(problem, pass_))
    if expected > option("longest"):
        pytest.skip(f"{backend.name} is expected to take {expected:.0f} s per call, more than --longest")

    operands = [
        operand.to(memory_format=MEMORY_FORMAT[layout]) for operand in _operands(problem.with_(layout="ncdhw"), pass_)
    ]

    def run() -> Tensor:
        result = _run(backend, problem, pass_, operands)
        if problem.device == "cuda":
            torch.cuda.synchronize()
        return result

    run()
    start = time.perf_counter()
    run()
    seconds = max(time.perf_counter() - start, 1e-9)
    rounds = 2 if option("quick") else int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, SECONDS_PER_RESULT / seconds)))
    benchmark.group = f"{name} {pass_}"
    result = benchmark.pedantic(run, rounds=rounds)
    exact = _torch_result(problem.with_(layout="ncdhw"), pass_)
    if backend.accuracy(problem, pass_).exact_integers:
        assert torch.equal(result, exact), "a wrong result has no speed"
    else:
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-3)

    if benchmark.stats is None:  # --benchmark-disable: each result is computed and checked, nothing is timed
        return
    median = benchmark.stats.stats.median
    record |= {
        "name": name,
        "problem": str(problem),
        "pass_": pass_,
        "backend": backend.name,
        "ours": backend.ours,
        "layout": layout,
        "flops": flops,
        "min_bytes": problem.min_bytes(pass_),
        "milliseconds": 1e3 * median,
        "gflops": flops / median / 1e9,
        "share_of_peak": flops / median / machine.peak_flops,
        "share_of_roofline": machine.least_seconds(flops, problem.min_bytes(pass_)) / median,
        "peak_gflops": machine.peak_flops / 1e9,
        "copy_gigabytes_per_second": machine.copy_bandwidth / 1e9,
        "cpu": machine.cpu,
        "gpu": machine.gpu,
        "threads": machine.threads,
        "pages": option("pages"),
        "torch": torch.__version__,
    }
    benchmark.extra_info.update(record)


def _run(backend: Backend, problem: ConvProblem, pass_: Pass, operands: list[Tensor]) -> Tensor:
    if pass_ == "forward":
        return backend.forward(problem, *operands, None)
    return getattr(backend, pass_)(problem, *operands)


@lru_cache(maxsize=1)
def _operands(problem: ConvProblem, pass_: Pass) -> tuple[Tensor, Tensor]:
    """The two operands of a pass; kept for the backends that follow on the same problem."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "forward": (problem.input_shape, problem.weight_shape),
        "grad_input": (problem.output_shape, problem.weight_shape),
        "grad_weight": (problem.output_shape, problem.input_shape),
    }[pass_]
    first, second = (
        torch.randint(-3, 4, shape, generator=generator, dtype=torch.int8).to(
            problem.device, getattr(torch, problem.dtype)
        )
        for shape in shapes
    )
    return first, second


@lru_cache(maxsize=1)
def _torch_result(problem: ConvProblem, pass_: Pass) -> Tensor:
    (aten,) = (backend for backend in REGISTRY if not backend.ours)
    return _run(aten, problem, pass_, list(_operands(problem, pass_)))
