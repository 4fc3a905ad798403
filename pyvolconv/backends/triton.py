"""Implicit GEMM in Triton: float32, float16 and bfloat16 on CUDA, or on the CPU in Triton's interpreter.

The kernels are imported when the first convolution runs. Triton decides at that moment whether they are
compiled or interpreted (TRITON_INTERPRET=1), for the rest of the process.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .triton_support import device_of, geometry, interpreter_asked, missing_here


class TritonBackend(Backend):
    """Implicit GEMM with float32 sums; bitwise reproducible in all three passes."""

    name: ClassVar[str] = "triton.implicit_gemm"
    family: ClassVar[str] = "triton"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        return missing_here(problem)

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from ..kernels.triton_forward import forward

        y = empty(problem, "output", like=x)
        launch = forward(x, weight, bias, *geometry(problem), y, **_multiplication(problem))
        with device_of(y):
            launch.run()
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        from ..kernels.triton_grad_input import grad_input

        grad_x = empty(problem, "input", like=grad_output)
        launch = grad_input(grad_output, weight, *geometry(problem), grad_x, **_multiplication(problem))
        with device_of(grad_x):
            launch.run()
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        from ..kernels.triton_grad_weight import grad_weight

        grad_w = empty(problem, "weight", like=x)
        launches = grad_weight(grad_output, x, *geometry(problem), grad_w, **_multiplication(problem))
        with device_of(grad_w):
            for launch in launches:
                launch.run()
        return grad_w

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """Float32 sums; tensor cores may cut a sum off where a scalar unit rounds it, which doubles the constant.

        TF32 keeps the exponent of float32 and the 10 fraction bits of float16, whose eps it therefore has;
        each of the two factors may be off by one of them.
        """
        dtype = "float16" if _input_precision(problem) == "tf32" else "float32"
        return Accuracy(constant=2.0, accumulate_dtype=dtype, bitwise_reproducible=True)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Estimates, not yet measured on a GPU: what the padding of `tl.dot` to 16 leaves of half the peak.

        In the interpreter, which is for tests, next to nothing.
        """
        if problem.device == "cpu":
            return 1e-6
        return 0.5 * min(1.0, min(problem.in_channels, problem.out_channels) / problem.groups / 16)


def _multiplication(problem: ConvProblem) -> dict[str, Any]:
    # The interpreter is NumPy, which has no bfloat16.
    return {
        "input_precision": _input_precision(problem),
        "widen": problem.dtype == "bfloat16" and interpreter_asked(),
    }


def _input_precision(problem: ConvProblem) -> str:
    """ "tf32" where the user lets torch's own CUDA convolutions round float32 operands, else "ieee"."""
    if problem.device != "cuda" or problem.dtype != "float32":
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision in (None, "none"):
        precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"
