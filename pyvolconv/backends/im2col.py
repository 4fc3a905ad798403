"""im2col in bounded tiles and torch's matrix product: the classical path, on CPU and CUDA."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..host import starts_two_wide_fmas
from ..problem import DTYPE_BYTES, ConvProblem, Pass
from . import cuda_peak
from .base import Accuracy, Backend, empty, geometry
from .linear_time import fewer_lanes

COPIED_VALUE = {False: 250, True: 490}
"""FLOPs at the peak of the CPU in the time that a value of a column takes, by `starts_two_wide_fmas`."""


class Im2colBackend(Backend):
    """Volume-to-column a tile at a time, then a GEMM; float32 and float64."""

    name: ClassVar[str] = "im2col"
    family: ClassVar[str] = "im2col"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = []
        if problem.device not in ("cpu", "cuda"):
            reasons.append(f"runs on cpu and cuda tensors, not on {problem.device}")
        elif problem.device == "cuda" and not torch.cuda.is_available():
            reasons.append("torch sees no CUDA device")
        if problem.dtype not in ("float32", "float64"):
            reasons.append(f"computes in float32 or float64, not in {problem.dtype}")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from ..kernels import im2col

        y = empty(problem, "output", like=x)
        im2col.forward(x, weight, bias, *geometry(problem), y)
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        from ..kernels import im2col

        grad_x = empty(problem, "input", like=grad_output)
        im2col.grad_input(grad_output, weight, *geometry(problem), grad_x)
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        from ..kernels import im2col

        grad_w = empty(problem, "weight", like=x)
        im2col.grad_weight(grad_output, x, *geometry(problem), grad_w)
        return grad_w

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """That of torch's matrix product, whose order of summation may change with threads and alignment.

        A plain sum in any order keeps constant 1. Where the user lets torch.matmul round float32 operands,
        each of the two is off by up to one eps of the narrower format; that of TF32 is float16's.
        """
        narrow = _narrow_matmul_dtype(problem)
        if narrow is None:
            return Accuracy(constant=1.0, accumulate_dtype=problem.dtype, bitwise_reproducible=False)
        return Accuracy(constant=2.0, accumulate_dtype=narrow, bitwise_reproducible=False)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """What is left of a GEMM's half of the peak (float64: a quarter) after the columns are written and read.

        A column is used once per channel of the product's other side, so few channels per group mean that
        copying dominates: on the CPU a value takes as long as some hundred FLOPs.
        """
        channels = min(problem.in_channels, problem.out_channels) // problem.groups
        reuse = (problem.in_channels if pass_ == "grad_input" else problem.out_channels) // problem.groups
        if problem.device == "cpu":
            cheap = starts_two_wide_fmas()
            moved = (12 if cheap else 5) * problem.min_bytes(pass_) / problem.flops(pass_)
            called = (4e7 if cheap else 2e7) / problem.flops(pass_)  # 80 microseconds
            if pass_ == "grad_input":
                # Few rows of a product with a large weight, which is read transposed.
                called += (800 if cheap else 400) * 4 * math.prod(problem.weight_shape) / problem.flops(pass_)
            return 1 / (2 * fewer_lanes(problem) + called + COPIED_VALUE[cheap] / (2 * reuse) + moved)
        reached = 0.3 if channels >= 16 else 0.15 if reuse >= 16 else 0.01 * reuse
        written_and_read = 2 * problem.batch * math.prod(problem.output_size) * problem.reduction_length("forward")
        copied = written_and_read * problem.groups * DTYPE_BYTES[problem.dtype]
        return cuda_peak.share_of_peak(problem, pass_, reached * cuda_peak.share_of_products(problem), copied)


def _narrow_matmul_dtype(problem: ConvProblem) -> str | None:
    """The dtype whose eps bounds the rounding that torch.matmul may apply to float32 operands, if any."""
    if problem.dtype != "float32":
        return None
    backend = torch.backends.cuda if problem.device == "cuda" else torch.backends.mkldnn
    precision = getattr(backend.matmul, "fp32_precision", "ieee")
    return {"tf32": "float16", "bf16": "bfloat16"}.get(precision)
