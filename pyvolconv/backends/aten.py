"""torch's own convolution: the peer that every path is compared with, and the last resort.

ATen pads both ends of an axis alike; what an asymmetric problem adds on one end only is padded
beforehand and cut from the gradient afterwards. Its kernels know real numbers only, so a complex
convolution is made of four real ones, as all three passes are linear in both operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import starts_two_wide_fmas
from ..problem import ConvProblem, Pass
from .base import MEMORY_FORMAT, Accuracy, Backend, empty

CALL = 5e5
"""FLOPs at the peak in the time by which a call of torch's kernels takes longer than one of ours, about 5 us."""


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
        """Shares of float32 FMA peak seen for oneDNN's and cuDNN's kernels (docs/performance.md).

        Float32 direct kernels reach about half of the peak, less where a channel count leaves vector lanes
        idle; float64 and grouped gradients fall to im2col or to a reference loop, float16 to a scalar one.
        """
        return 1 / (1 / self._share_of_peak(problem, pass_) + CALL / max(problem.flops(pass_), 1))

    @staticmethod
    def _share_of_peak(problem: ConvProblem, pass_: Pass) -> float:
        lanes = min(problem.in_channels, problem.out_channels) // problem.groups
        if problem.device == "cpu":
            if problem.dtype == "float64":
                return 0.04
            if problem.dtype == "float16" and not _has_float16():
                return 0.1 if pass_ == "grad_weight" else 0.01
            if problem.groups > 1 and pass_ != "forward":
                return 0.02
            if _is_depthwise_of_whole_vectors(problem) and starts_two_wide_fmas():
                return 0.2
            if problem.dtype == "bfloat16" and torch.cpu._is_avx512_bf16_supported():
                return _onednn_bfloat16_efficiency(problem, pass_)
            if problem.dtype == "float32" and problem.groups == 1 and not _falls_to_im2col(problem):
                efficiency = _onednn_efficiency(problem, pass_)
                # Its calls take ten microseconds more than ours.
                calls = 5e6 / max(problem.flops(pass_), 1) if starts_two_wide_fmas() else 0.0
                return 1 / (1 / efficiency + calls)
        return 0.5 if lanes >= 16 else 0.1


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


def _is_depthwise_of_whole_vectors(problem: ConvProblem) -> bool:
    """What oneDNN has a kernel for that only memory holds up, with few taps sooner than ours."""
    depthwise = problem.groups == problem.in_channels == problem.out_channels and problem.in_channels % 16 == 0
    few = math.prod(problem.kernel_size) <= 27
    return depthwise and few and problem.dtype == "float32" and problem.layout == "ndhwc"


def _onednn_efficiency(problem: ConvProblem, pass_: Pass) -> float:
    """Share of FMA peak of oneDNN's float32 kernels without groups.

    With 16 channels and more they run at 0.93 of peak (ncdhw 0.9), channels rounded up to whole vectors of 16, and
    leave out taps that lie in the padding; memory takes the time of 12 FLOPs for each byte to be moved, of 5 where a
    product needs no window. Touching windows are slower, in ncdhw much. The weight gradient in ndhwc is nearly as
    good as ours, and better where much is padding. Where two wide FMAs start per cycle, a byte takes the time of 2.5
    times as many FLOPs, and large kernels from few channels reach 0.7.
    """
    cheap = starts_two_wide_fmas()
    channels = min(problem.in_channels, problem.out_channels)
    used = min(count / (-(-count // 16) * 16) for count in (problem.in_channels, problem.out_channels))
    moved = (2.5 if cheap else 1) * problem.min_bytes(pass_) / problem.flops(pass_)
    ndhwc = problem.layout == "ndhwc"
    large = cheap and problem.in_channels <= 4 and math.prod(problem.kernel_size) >= 49
    if large and (pass_ == "forward" or (pass_ == "grad_weight" and problem.out_channels < 16)):
        return 0.7
    windows = problem.kernel_size not in ((1, 1, 1), problem.stride)
    if pass_ == "grad_weight":
        dense = problem.stride == problem.dilation == (1, 1, 1) and min(problem.kernel_size) > 1
        good = ndhwc and dense and 8 <= channels <= 192
        if good:
            return 0.72 * max(used, 0.8 if cheap else 0.5) / _inside_share(problem)
        return (
            (1 / (2 + (5 if problem.kernel_size == (1, 1, 1) else 12) * moved) if cheap else 0.5)
            if channels >= 16
            else 0.1
        )
    if problem.kernel_size == (1, 1, 1) and (channels >= 16 or ndhwc):
        return 1 / (1 / 0.85 + 5 * moved)
    if channels < 16:
        return 0.1
    touching = (0.85 if pass_ == "forward" else 0.6) if cheap else 0.7
    reached = (0.93 if ndhwc else 0.9) if windows else touching if ndhwc else 0.4
    return 1 / (_inside_share(problem) / (reached * used) + 12 * moved)


def _onednn_bfloat16_efficiency(problem: ConvProblem, pass_: Pass) -> float:
    """The same of its bfloat16 kernels, with AVX512_BF16: 1.9 of float32 FMA peak, 1.7 for the weight gradient.

    Memory takes the time of 16 FLOPs for each byte to be moved, of 50 in ncdhw, which is reordered before and after.
    """
    sources, targets = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if pass_ == "grad_input":
        sources, targets = targets, sources
    if sources < 3:
        return 0.2
    used = targets / (-(-targets // 16) * 16)
    if pass_ == "grad_weight":
        dense = max(problem.dilation) == 1 and problem.kernel_size != problem.stride
        reached = 1.7 * max(used, 0.5) if dense else 0.5
    else:
        reached = 1.9 * used / _inside_share(problem)
    moved = problem.min_bytes(pass_) / problem.flops(pass_)
    return 1 / (1 / reached + (16 if problem.layout == "ndhwc" else 50) * moved)


def _inside_share(problem: ConvProblem) -> float:
    """Which part of the products of output voxels and taps has an input voxel that is not padding; never zero."""
    share = 1.0
    for size, out, kernel, stride, (begin, _), dilation in zip(
        problem.input_size,
        problem.output_size,
        problem.kernel_size,
        problem.stride,
        problem.padding,
        problem.dilation,
        strict=True,
    ):
        inside = 0
        for tap in range(kernel):
            offset = tap * dilation - begin  # of the tap's voxel for output 0
            first, end = max(0, -(offset // stride)), min(out, (size - 1 - offset) // stride + 1)
            inside += max(0, end - first)
        share *= max(inside, 1) / (out * kernel)
    return share


def _falls_to_im2col(problem: ConvProblem) -> bool:
    """Torch leaves oneDNN alone for one small sample (`use_mkldnn` in ATen/native/Convolution.cpp)."""
    values = problem.in_channels * problem.input_size[0] * problem.input_size[1]
    return problem.batch == 1 and max(problem.kernel_size) <= 3 and values <= 20480


def _has_float16() -> bool:
    """Whether oneDNN has float16 kernels for this processor (those of avx512_fp16 and above)."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


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
