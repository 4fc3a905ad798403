"""A backend whose passes are launches of Triton kernels: one result, one list of launches, run or only compiled."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..epilogue import Activation
from ..problem import ConvProblem, Pass
from .base import MEMORY_FORMAT, Accuracy, Backend, empty, operand_shapes
from .cuda_peak import arithmetic
from .triton_support import device_of, interpreter_asked

if TYPE_CHECKING:
    from ..kernels.triton_epilogue import Epilogue

RESULT = {"forward": "output", "grad_input": "input", "grad_weight": "weight"}

CALL_SECONDS = 25e-6
"""What a pass takes on the host, an estimate."""


class TritonLaunches(Backend):
    """Float32 sums; bitwise reproducible in all three passes."""

    family: ClassVar[str] = "triton"

    @abstractmethod
    def launches(self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None], result: Tensor) -> list[Any]:
        """What writes a pass of the operands (of forward with the bias, or None, last) into the result, in order."""

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._run(problem, "forward", [x, weight, bias])

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        return self._run(problem, "grad_input", [grad_output, weight])

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        return self._run(problem, "grad_weight", [grad_output, x])

    def _run(self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None]) -> Tensor:
        result = empty(problem, RESULT[pass_], like=operands[0])  # type: ignore[arg-type]
        with device_of(result):
            for launch in self.launches(problem, pass_, operands, result):
                launch.run()
        return result

    def prepare(self, problem: ConvProblem, pass_: Pass) -> None:
        """Compile the kernels of a pass, from tensors without memory."""
        dtype = getattr(torch, problem.dtype)
        memory_format = MEMORY_FORMAT[problem.layout]

        def without_memory(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

        operands: list[Tensor | None] = [without_memory(shape) for shape in operand_shapes(problem, pass_)]
        if pass_ == "forward":
            operands.append(torch.empty(problem.out_channels, dtype=dtype, device="meta") if problem.bias else None)
        result = empty(problem, RESULT[pass_], like=operands[0])  # type: ignore[arg-type]
        for launch in self.launches(problem, pass_, operands, result):
            launch.compile()

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """Float32 sums; tensor cores may cut a sum off where a scalar unit rounds it, which doubles the constant.

        TF32 keeps the exponent of float32 and the 10 fraction bits of float16, whose eps it therefore has;
        each of the two factors may be off by one of them.
        """
        dtype = "float16" if input_precision(problem) == "tf32" else "float32"
        return Accuracy(constant=2.0, accumulate_dtype=dtype, bitwise_reproducible=True)


class EpilogueLaunches(TritonLaunches):
    """A backend of launches whose forward pass adds a residual and applies an activation to results in registers."""

    @abstractmethod
    def launches(
        self,
        problem: ConvProblem,
        pass_: Pass,
        operands: list[Tensor | None],
        result: Tensor,
        epilogue: Epilogue | None = None,
    ) -> list[Any]:
        """As of every such backend; `epilogue` is of forward only."""

    def forward_epilogue(
        self,
        problem: ConvProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: Activation,
        negative_slope: float,
    ) -> Tensor:
        from ..kernels.triton_epilogue import Epilogue

        y = empty(problem, "output", like=x)
        epilogue = Epilogue(activation, negative_slope, residual)
        with device_of(y):
            for launch in self.launches(problem, "forward", [x, weight, bias], y, epilogue):
                launch.run()
        return y


def multiplication(problem: ConvProblem) -> dict[str, Any]:
    """How `tl.dot` multiplies, as keyword arguments of the functions in `pyvolconv.kernels`."""
    # The interpreter is NumPy, which has no bfloat16.
    return {
        "input_precision": input_precision(problem),
        "widen": problem.dtype == "bfloat16" and interpreter_asked(),
    }


def input_precision(problem: ConvProblem) -> str:
    """ "tf32" where the user lets torch's own CUDA convolutions round float32 operands, else "ieee"."""
    return "tf32" if problem.device == "cuda" and arithmetic(problem) == "tf32" else "ieee"
