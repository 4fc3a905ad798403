"""The fused passes under test: of the extension, and compiled here from csrc/ by the local compiler."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from pyvolconv.backends.base import empty
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.epilogue import ACTIVATIONS
from pyvolconv.problem import ConvProblem

CPP = next(backend for backend in REGISTRY if backend.name == "cpp.direct")


def numbers(problem: ConvProblem) -> list[int]:
    """A problem as tests/cpp_fused_harness.cpp reads it."""
    begin, end = zip(*problem.padding, strict=True)
    head = [problem.batch, problem.in_channels, problem.out_channels, problem.groups, int(problem.layout == "ndhwc")]
    sizes = (problem.input_size, problem.output_size, problem.kernel_size, problem.stride)
    assert problem.pool is not None
    pool = (problem.pool.window, problem.pool.stride, problem.pool.padding, problem.pooled_size)
    triples = itertools.chain(*sizes, begin, end, problem.dilation, *pool)
    return [*head, ACTIVATIONS.index(problem.activation), *triples]


class Fused:
    """The three fused passes of the extension, as `pyvolconv.ops` calls them."""

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return CPP.forward_max_pool(problem, x, weight, bias)

    def grad_input(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        return CPP.grad_input_max_pool(problem, grad, code, weight)

    def grad_weight(self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        of_weight, of_bias = CPP.grad_weight_max_pool(problem.with_(bias=True), grad, code, x)
        assert of_bias is not None
        return of_weight, of_bias


class WideFused(Fused):
    """The same, of a library of tests/cpp_fused_harness.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _run(self, problem: ConvProblem, pass_: int, *tensors: Tensor | None) -> None:
        torch.get_num_threads()
        self.library.run_pass(
            (ctypes.c_int64 * 39)(*numbers(problem)),
            ctypes.c_double(problem.negative_slope),
            int(problem.dtype == "float64"),
            pass_,
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        )

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        value, code = empty(problem, "pooled", x), empty(problem, "code", x)
        self._run(problem, 0, x, weight, bias, value, code)
        return value, code

    def grad_input(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad)
        self._run(problem, 1, grad, weight, None, result, code)
        return result

    def grad_weight(self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        of_weight, of_bias = empty(problem, "weight", grad), grad.new_empty(problem.out_channels)
        self._run(problem, 2, grad, x, of_bias, of_weight, code)
        return of_weight, of_bias
