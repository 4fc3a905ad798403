"""torch's own convolution: the peer that every path is compared with, and the last resort.

ATen pads both ends of an axis alike; what an asymmetric problem adds on one end only is padded
beforehand and cut from the gradient afterwards. Its kernels know real numbers only, so a complex
convolution is made of four real ones, as all three passes are linear in both operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import ConvProblem, Pass
from . import aten_on_cuda
from .aten_efficiency import call_overhead, share_of_peak
from .base import MEMORY_FORMAT, Accuracy, Backend, empty


class AtenBackend(Backend):
    """`torch.ops.aten.convolution` and `convolution_backward` (oneDNN, cuDNN or im2col inside)."""

    name: ClassVar[str] = "aten"
    family: ClassVar[str] = "aten"
    ours: ClassVar[bool] = False

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        if pass_ == "grad_weight" and "int" in problem.dtype:
            return [f"torch has no weight gradient of {problem.dtype}"]
        if problem.dtype == "bfloat16" and problem.device == "cpu" and _reaches_beyond(problem):
            return ["torch's bfloat16 kernels read what is not theirs where a window is larger than the input"]
        if problem.dtype in ("float32", "float16") and problem.device == "cpu" and is_corrupted(problem):
            return [
                "torch's kernels write what is not theirs where padding exceeds half a window and a window the input"
            ]
        return []

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_complex():
            y = _complex(lambda x, weight: self.forward(problem, x, weight, None), x, weight)
            return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))
        padding, excess = _split_padding(problem)
        if any(excess):
            x = F.pad(x, excess)
        y = torch.convolution(
            x, weight, bias, problem.stride, padding, problem.dilation, False, [0, 0, 0], problem.groups
        )
        return _dense(y, problem)

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        if grad_output.is_complex():
            return _complex(lambda grad, weight: self.grad_input(problem, grad, weight), grad_output, weight)
        padding, excess = _split_padding(problem)
        size = [
            size + begin + end
            for size, begin, end in zip(problem.input_size, excess[4::-2], excess[5::-2], strict=True)
        ]
        if grad_output.is_floating_point():
            # Only the sizes of the input are read; its pages are never touched.
            x = torch.empty(
                (problem.batch, problem.in_channels, *size),
                dtype=grad_output.dtype,
                device=grad_output.device,
                memory_format=MEMORY_FORMAT[problem.layout],
            )
            grad = _backward(problem, grad_output, x, weight, padding, (True, False, False))[0]
        else:
            grad = _transposed(problem, grad_output, weight, padding, size)
        if any(excess):
            grad = F.pad(grad, [-amount for amount in excess])
        return _dense(grad, problem)

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        if grad_output.is_complex():
            return _complex(lambda grad, x: self.grad_weight(problem, grad, x), grad_output, x)
        padding, excess = _split_padding(problem)
        if any(excess):
            x = F.pad(x, excess)
        weight = empty(problem, "weight", like=x)
        return _dense(_backward(problem, grad_output, x, weight, padding, (False, True, False))[1], problem)

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        # fp16 and bf16 partial sums may be kept in the narrow dtype; oneDNN splits reductions by threads.
        return Accuracy(constant=2.0, accumulate_dtype=problem.dtype, bitwise_reproducible=False)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        if problem.device == "cuda":
            return aten_on_cuda.expected_share(problem, pass_)
        return 1 / (1 / share_of_peak(problem, pass_) + call_overhead(problem, pass_))


def _reaches_beyond(problem: ConvProblem) -> bool:
    """Whether a window is larger than the input, or would be one stride on, with a dilation.

    oneDNN's bfloat16 kernels crash or return what uninitialised memory held for some of these: all 90 failures among
    4740 random passes (torch 2.13, AVX512_BF16 and AMX) have this in common, and 581 passes that were right.
    """
    dilated = max(problem.dilation) > 1
    for size, kernel, stride, dilation in zip(
        problem.input_size, problem.kernel_size, problem.stride, problem.dilation, strict=True
    ):
        extent = (kernel - 1) * dilation + 1
        if extent > size or (dilated and kernel > 1 and stride > 1 and extent + stride > size):
            return True
    return False


def is_corrupted(problem: ConvProblem) -> bool:
    """Whether padding on both ends of an axis exceeds half a window, and a window (on any axis) the input.

    oneDNN's float32 kernels corrupt the heap or return wrong weight gradients for some of these: all 9 failures among
    18,000 random problems (torch 2.13, AVX-512) have this in common, and none of 18,000 others failed.
    """
    return _reaches_beyond(problem) and any(
        min(pair) > ((kernel - 1) * dilation + 1) // 2
        for pair, kernel, dilation in zip(problem.padding, problem.kernel_size, problem.dilation, strict=True)
    )


@lru_cache(maxsize=1024)
def _split_padding(problem: ConvProblem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(padding that both ends share, per axis; the rest in the order of `F.pad`: last axis first)."""
    shared = [min(pair) for pair in problem.padding]
    excess: list[int] = []
    for (begin, end), both in zip(reversed(problem.padding), reversed(shared), strict=True):
        excess += [begin - both, end - both]
    return tuple(shared), tuple(excess)


def _complex(product: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """(a + ib)(c + id) = (ac - bd) + i(ad + bc) for a bilinear `product` of real tensors."""
    real = product(first.real, second.real) - product(first.imag, second.imag)
    imaginary = product(first.real, second.imag) + product(first.imag, second.real)
    return torch.complex(real, imaginary)


def _transposed(
    problem: ConvProblem, grad_output: Tensor, weight: Tensor, padding: Sequence[int], size: Sequence[int]
) -> Tensor:
    """grad_input as a transposed convolution, which ATen has for integers too."""
    # What the stride leaves over at the end of the input.
    remainder = [
        (size[axis] + 2 * padding[axis] - problem.dilation[axis] * (problem.kernel_size[axis] - 1) - 1)
        % problem.stride[axis]
        for axis in range(3)
    ]
    return torch.convolution(
        grad_output, weight, None, problem.stride, padding, problem.dilation, True, remainder, problem.groups
    )


def _backward(
    problem: ConvProblem,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward.default(  # type: ignore[no-any-return]
        grad_output,
        x,
        weight,
        None,
        problem.stride,
        padding,
        problem.dilation,
        False,
        [0, 0, 0],
        problem.groups,
        output_mask,
    )


def _dense(tensor: Tensor, problem: ConvProblem) -> Tensor:
    return tensor.contiguous(memory_format=MEMORY_FORMAT[problem.layout])
