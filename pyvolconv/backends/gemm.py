"""Windows that do not overlap as one matrix product: patch embeddings and kernels of one tap, on CUDA (and the CPU)."""

from __future__ import annotations

import math
import os
from typing import ClassVar

import torch
from torch import Tensor

from ..host import starts_two_wide_fmas
from ..precision import float32_arithmetic, must_be_deterministic
from ..problem import DTYPE_BYTES, ConvProblem, Pass
from . import cuda_peak
from .base import MEMORY_FORMAT, Accuracy, Backend, empty, geometry
from .im2col import COPIED_VALUE
from .linear_time import fewer_lanes

_ROUNDS_LIKE = {"ieee": "float32", "tf32": "float16", "bf16": "bfloat16"}
"""The dtype that has as many fraction bits as float32 operands keep."""

_LARGEST_MATRIX = 2**31 - 1
_CALL_SECONDS = 15e-6
"""What a call takes on the host."""


class GemmBackend(Backend):
    """torch.mm, cuBLAS inside on CUDA: its results have the same bits for every run on one device.

    That holds for one call at a time: cuBLAS promises it for the same version, device and number of multiprocessors.
    """

    name: ClassVar[str] = "gemm"
    family: ClassVar[str] = "gemm"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = []
        if problem.device not in ("cpu", "cuda"):
            reasons.append(f"runs on cpu and cuda tensors, not on {problem.device}")
        elif problem.device == "cuda":
            reasons += _missing_on_cuda(problem.dtype)
        if problem.dtype not in ("float64", "float32", "float16", "bfloat16"):
            reasons.append(f"computes in float64, float32, float16 or bfloat16, not in {problem.dtype}")
        elif problem.dtype == "float32":
            reasons += _rounds_more_than_convolutions(problem.device)
        return reasons + _not_one_product(problem)

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from ..kernels import gemm

        y = empty(problem, "output", like=x)
        gemm.forward(x, weight, bias, *geometry(problem), y)
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        from ..kernels import gemm

        grad_x = empty(problem, "input", like=grad_output)
        gemm.grad_input(grad_output, weight, *geometry(problem), grad_x)
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        from ..kernels import gemm

        grad_w = empty(problem, "weight", like=x)
        gemm.grad_weight(grad_output, x, *geometry(problem), grad_w)
        return grad_w

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """That of torch's matrix product.

        cuBLAS may split a half precision product along its sum and add the parts in half precision where torch lets it,
        as it does by default (`torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`, and the same for
        bf16); else sums are float32's, which tensor cores cut off where a scalar unit rounds. On the CPU the order of a
        sum may change with threads and alignment.
        """
        on_cuda, dtype = problem.device == "cuda", problem.dtype
        if dtype == "float32":
            dtype = _operand_precision(problem.device)
        elif dtype != "float64" and on_cuda and not _adds_parts_in_half_precision(dtype):
            dtype = "float32"
        constant = 1.0 if dtype == problem.dtype in ("float32", "float64") else 2.0
        return Accuracy(constant, dtype, bitwise_reproducible=on_cuda)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """On CUDA what a matrix product reaches of the peak, less a copy of the windows where they are no matrix yet.

        So it is on the CPU, where short pieces take longer to copy, in units of `COPIED_VALUE`. Half precision and
        kernels of one tap have faster kernels there.
        """
        if problem.device == "cuda":
            reached = 0.85 * cuda_peak.share_of_products(problem) * _filled(problem)
            return cuda_peak.share_of_peak(problem, pass_, reached, _copied_bytes(problem), _CALL_SECONDS)
        if problem.dtype != "float64" and _operand_precision(problem.device) != problem.dtype:
            return 1e-6
        if problem.kernel_size == (1, 1, 1) != problem.input_size:
            return 1e-6
        cheap, slower = starts_two_wide_fmas(), fewer_lanes(problem)
        called = (2e7 if cheap else 1e7) / problem.flops(pass_)  # 40 microseconds of Python and of torch's operators
        if problem.kernel_size == problem.input_size:
            return 1 / (slower / 0.9 + called + 5 * problem.min_bytes(pass_) / problem.flops(pass_))
        piece = problem.kernel_size[2] * (problem.in_channels if problem.layout == "ndhwc" else 1)
        windows = problem.batch * math.prod(problem.output_size) * problem.reduction_length("forward")
        copied = windows * (0.6 + 5 / piece) * COPIED_VALUE[cheap] / problem.flops(pass_)
        moved = (12 if cheap else 5) * problem.min_bytes(pass_) / problem.flops(pass_)
        return 1 / (slower / 0.8 + called + copied + moved)


def _not_one_product(problem: ConvProblem) -> list[str]:
    reasons = []
    if problem.groups > 1:
        reasons.append(f"multiplies all channels with all; groups={problem.groups}")
    if any(map(any, problem.padding)):
        reasons.append(f"takes windows as they are in the input, without padding; padding={problem.padding}")
    extents = [(taps - 1) * dilation + 1 for taps, dilation in zip(problem.kernel_size, problem.dilation, strict=True)]
    if any(
        size > 1 and extent > stride
        for size, extent, stride in zip(problem.output_size, extents, problem.stride, strict=True)
    ):
        reasons.append(
            f"takes windows that do not overlap; kernel_size={problem.kernel_size} with dilation={problem.dilation} "
            f"reaches further than stride={problem.stride}"
        )
    rows, columns = problem.batch * math.prod(problem.output_size), math.prod(problem.weight_shape[1:])
    if max(rows, columns, problem.out_channels) > _LARGEST_MATRIX:
        reasons.append(f"BLAS counts in 32 bits; the windows are a matrix of {rows} x {columns}")
    return reasons


def _missing_on_cuda(dtype: str) -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    reasons = []
    if dtype == "float16" and torch.backends.cuda.matmul.allow_fp16_accumulation:
        reasons.append(
            "torch.backends.cuda.matmul.allow_fp16_accumulation is set, and convolutions are summed in float32"
        )
    if must_be_deterministic() and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        reasons.append(
            "torch.use_deterministic_algorithms(True) wants CUBLAS_WORKSPACE_CONFIG=:4096:8 (or :16:8) in the "
            "environment before the first matrix product"
        )
    return reasons


def _rounds_more_than_convolutions(device: str) -> list[str]:
    product, convolution = float32_arithmetic(device, "matmul"), float32_arithmetic(device, "conv")
    if _eps(_ROUNDS_LIKE[product]) <= _eps(_ROUNDS_LIKE[convolution]):
        return []
    library = "cuda" if device == "cuda" else "mkldnn"
    return [
        f"matrix products would round more than convolutions: torch.backends.{library}.matmul.fp32_precision is "
        f'"{product}", that of convolutions is "{convolution}"'
    ]


def _operand_precision(device: str) -> str:
    """The dtype whose eps bounds the rounding of float32 operands by torch.mm."""
    return _ROUNDS_LIKE[float32_arithmetic(device, "matmul")]


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def _adds_parts_in_half_precision(dtype: str) -> bool:
    switches = torch.backends.cuda.matmul
    if dtype == "float16":
        return bool(switches.allow_fp16_reduced_precision_reduction)
    return bool(switches.allow_bf16_reduced_precision_reduction)


def _filled(problem: ConvProblem) -> float:
    """Share in use of matrices rounded up to the 16 values that tensor cores multiply at once."""
    return min(1.0, problem.reduction_length("forward") / 16, problem.out_channels / 16)


def _copied_bytes(problem: ConvProblem) -> int:
    """Read and written once more, to bring windows together."""
    from ..kernels import gemm

    tensors = (
        torch.empty(shape, device="meta", memory_format=MEMORY_FORMAT[problem.layout])
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    if not gemm.copies_windows(*tensors, *geometry(problem)):
        return 0
    windows = problem.batch * math.prod(problem.output_size) * problem.reduction_length("forward")
    return 2 * windows * DTYPE_BYTES[problem.dtype]
