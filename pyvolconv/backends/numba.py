"""The readable reference: plain loops compiled by Numba. Runs only when named.

Numba keeps a thread pool of its own. This file makes that pool behave like torch's:

- it uses `torch.get_num_threads()` threads, looked up at each call;
- calls from several Python threads wait for each other, since Numba's workqueue layer aborts the process
  when two parallel regions overlap;
- in a process made by `fork()` the pool's threads are gone, and Numba's layers hang or end the process on
  the next parallel region: there the loops run on the calling thread alone.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty

_importing_process = os.getpid()
_parallel_region = threading.Lock()


class NumbaBackend(Backend):
    """Plain loops, one thread per output plane; float32 and float64 on the CPU."""

    name: ClassVar[str] = "numba"
    family: ClassVar[str] = "numba"
    automatic: ClassVar[bool] = False

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = []
        if importlib.util.find_spec("numba") is None:
            reasons.append("numba is not installed: pip install numba")
        if problem.device != "cpu":
            reasons.append(f"runs on cpu tensors, not on {problem.device}")
        if problem.dtype not in ("float32", "float64"):
            reasons.append(f"computes in float32 or float64, not in {problem.dtype}")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", like=x)
        if bias is None:
            bias = x.new_zeros(problem.out_channels)
        _run("forward", problem, x, weight, bias, result=y)
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_x = empty(problem, "input", like=grad_output)
        _run("grad_input", problem, grad_output, weight, result=grad_x)
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        grad_w = empty(problem, "weight", like=x)
        _run("grad_weight", problem, grad_output, x, result=grad_w)
        return grad_w

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        return Accuracy(constant=1.0, accumulate_dtype=problem.dtype, bitwise_reproducible=True)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """One multiplication and one addition at a time, each waiting for the one before: about 1% of peak."""
        return 0.01


def _run(pass_: Pass, problem: ConvProblem, *operands: Tensor, result: Tensor) -> None:
    padding = tuple(begin for begin, _ in problem.padding)
    arguments = (
        *(operand.numpy() for operand in operands),
        problem.stride,
        padding,
        problem.dilation,
        problem.groups,
        result.numpy(),
    )
    if os.getpid() != _importing_process:
        _run_serial(pass_, arguments)
    else:
        _run_parallel(pass_, arguments)


def _run_serial(pass_: Pass, arguments: tuple[Any, ...]) -> None:
    from ..kernels import reference

    reference.compiled(pass_, parallel=False)(*arguments)


def _run_parallel(pass_: Pass, arguments: tuple[Any, ...]) -> None:
    import numba

    from ..kernels import reference

    torch_threads = torch.get_num_threads()
    with _parallel_region:
        numba_threads = numba.get_num_threads()
        numba.set_num_threads(min(torch_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            reference.compiled(pass_, parallel=True)(*arguments)
        finally:
            numba.set_num_threads(numba_threads)
            # Numba's OpenMP layer sets the thread count of the runtime that it shares with torch.
            if torch.get_num_threads() != torch_threads:
                torch.set_num_threads(torch_threads)
