"""The readable reference: plain loops compiled by Numba. Runs only when named.

Numba keeps a thread pool of its own. This file makes that pool behave like torch's:

- it uses `torch.get_num_threads()` threads, looked up at each call;
- calls from several Python threads wait for each other, since Numba's workqueue layer aborts the process
  when two parallel regions overlap;
- in a process made by `fork()` the pool's threads are gone, and Numba's layers hang or end the process on
  the next parallel region: there the loops run on the calling thread alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..epilogue import ACTIVATIONS, Size3
from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty, geometry

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
        _call("reference", "forward", (x, weight, bias), geometry(problem), (y,))
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_x = empty(problem, "input", like=grad_output)
        _call("reference", "grad_input", (grad_output, weight), geometry(problem), (grad_x,))
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        grad_w = empty(problem, "weight", like=x)
        _call("reference", "grad_weight", (grad_output, x), geometry(problem), (grad_w,))
        return grad_w

    def forward_max_pool(
        self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pooled, code = empty(problem, "pooled", like=x), empty(problem, "code", like=x)
        if bias is None:
            bias = x.new_zeros(problem.out_channels)
        # A NumPy scalar of the tensors' dtype, so that a product with it is rounded as torch rounds it.
        slope = x.new_tensor(problem.negative_slope).numpy()[()]
        sizes = (
            *geometry(problem),
            ACTIVATIONS.index(problem.activation),
            slope,
            *_pool(problem),
            problem.output_size,
        )
        _call("reference_max_pool", "forward", (x, weight, bias), sizes, (pooled, code))
        return pooled, code

    def grad_input_max_pool(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        grad_x = empty(problem, "input", like=grad)
        sizes = (*geometry(problem), *_pool(problem))
        _call("reference_max_pool", "grad_input", (grad, code, weight), sizes, (grad_x,))
        return grad_x

    def grad_weight_max_pool(
        self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        grad_w, grad_b = empty(problem, "weight", like=x), x.new_empty(problem.out_channels)
        sizes = (*geometry(problem), *_pool(problem))
        _call("reference_max_pool", "grad_weight", (grad, code, x), sizes, (grad_w, grad_b))
        return grad_w, grad_b if problem.bias else None

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        return Accuracy(constant=1.0, accumulate_dtype=problem.dtype, bitwise_reproducible=True)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """One multiplication and one addition at a time, each waiting for the one before: about 1% of peak."""
        return 0.01


def _pool(problem: ConvProblem) -> tuple[Size3, Size3, Size3]:
    assert problem.pool is not None
    return problem.pool.window, problem.pool.stride, problem.pool.padding


def _call(
    kernels: str, pass_: Pass, operands: Sequence[Tensor], sizes: tuple[Any, ...], results: Sequence[Tensor]
) -> None:
    """One pass of the file `kernels`, in parallel where Numba's threads exist."""
    loops = importlib.import_module(f"..kernels.{kernels}", __package__)
    arguments = (*(tensor.numpy() for tensor in operands), *sizes, *(tensor.numpy() for tensor in results))
    if os.getpid() != _importing_process:
        loops.compiled(pass_, parallel=False)(*arguments)
    else:
        _call_parallel(loops.compiled(pass_, parallel=True), arguments)


def _call_parallel(loops: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import numba

    torch_threads = torch.get_num_threads()
    with _parallel_region:
        numba_threads = numba.get_num_threads()
        numba.set_num_threads(min(torch_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            loops(*arguments)
        finally:
            numba.set_num_threads(numba_threads)
            # Numba's OpenMP layer sets the thread count of the runtime that it shares with torch.
            if torch.get_num_threads() != torch_threads:
                torch.set_num_threads(torch_threads)
