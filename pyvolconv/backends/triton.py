"""Implicit GEMM in Triton: float32, float16 and bfloat16 on CUDA, or on the CPU in Triton's interpreter.

The kernels are imported when the first convolution runs. Triton decides at that moment whether they are
compiled or interpreted (TRITON_INTERPRET=1), for the rest of the process.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty

_COMMON = "pyvolconv.kernels.triton_common"
_LARGEST_GRID = 2**31 - 1


class TritonBackend(Backend):
    """Implicit GEMM with float32 sums; bitwise reproducible in all three passes."""

    name: ClassVar[str] = "triton"
    family: ClassVar[str] = "triton"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed: pip install triton (Linux)")
        if problem.device == "cuda":
            reasons += _missing_on_cuda(problem.dtype)
        elif problem.device != "cpu":
            reasons.append(f"runs on cuda tensors, not on {problem.device}")
        elif not _interpreter_asked():
            reasons.append("no CUDA tensors, and TRITON_INTERPRET=1 is not set (for tests on the CPU)")
        else:
            reasons += _missing_in_interpreter()
        if problem.dtype not in ("float32", "float16", "bfloat16"):
            reasons.append(f"computes in float32, float16 or bfloat16, not in {problem.dtype}")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from ..kernels.triton_forward import forward

        y = empty(problem, "output", like=x)
        launch = forward(x, weight, bias, *_geometry(problem), y, **_multiplication(problem))
        with _device_of(y):
            launch.run()
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        from ..kernels.triton_grad_input import grad_input

        grad_x = empty(problem, "input", like=grad_output)
        launch = grad_input(grad_output, weight, *_geometry(problem), grad_x, **_multiplication(problem))
        with _device_of(grad_x):
            launch.run()
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        from ..kernels.triton_grad_weight import grad_weight

        grad_w = empty(problem, "weight", like=x)
        launches = grad_weight(grad_output, x, *_geometry(problem), grad_w, **_multiplication(problem))
        with _device_of(grad_w):
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


def _geometry(
    problem: ConvProblem,
) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], int]:
    (depth, _), (height, _), (width, _) = problem.padding
    return problem.stride, (depth, height, width), problem.dilation, problem.groups


def _interpreter_asked() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _missing_in_interpreter() -> list[str]:
    if _COMMON in sys.modules and not sys.modules[_COMMON].INTERPRETED:
        return ["TRITON_INTERPRET=1 was set after the kernels were loaded; set it before the process starts"]
    if importlib.util.find_spec("triton") is None:
        return []
    import numpy
    import triton

    # Loop bounds: triton.runtime.interpreter calls int() on an array of one value, which NumPy 2.4 refuses.
    if _major_minor(triton.__version__) < (3, 7) and _major_minor(numpy.__version__) >= (2, 4):
        return [f"the interpreter of Triton {triton.__version__} needs NumPy < 2.4, this is {numpy.__version__}"]
    return []


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _missing_on_cuda(dtype: str) -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 5):
        return ["Triton needs a GPU of compute capability 7.5 or more"]
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["this GPU has no bfloat16 arithmetic; use float16"]
    return []


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _multiplication(problem: ConvProblem) -> dict[str, Any]:
    # The interpreter is NumPy, which has no bfloat16.
    return {
        "input_precision": _input_precision(problem),
        "widen": problem.dtype == "bfloat16" and _interpreter_asked(),
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
