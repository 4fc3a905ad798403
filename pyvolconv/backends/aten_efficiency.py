"""What share of the machine's float32 FMA peak torch's own kernels are expected to reach: the cost model of `aten`.

The numbers are fitted to measurements (docs/performance.md). On the CPU float32 and bfloat16 run in oneDNN, unless
torch leaves it alone; float64 and grouped gradients in im2col or a loop, float16 in a scalar loop without AVX512_FP16,
its weight gradient with it.
On CUDA the model is that of `aten_on_cuda.py`.
"""

from __future__ import annotations

import math

import torch

from ..host import starts_two_wide_fmas
from ..problem import ConvProblem, Pass
from . import aten_float64_time, aten_onednn_time


def share_of_peak(problem: ConvProblem, pass_: Pass) -> float:
    """Expected FLOPs per second over the FMA peak of float32."""
    if problem.device == "cpu":
        if problem.dtype == "float64":
            return problem.flops(pass_) / aten_float64_time.expected_time(problem, pass_, starts_two_wide_fmas())
        if problem.dtype == "float16" and (pass_ == "grad_weight" or not _has_float16()):
            return 0.001 if _has_float16() else 0.1 if pass_ == "grad_weight" else 0.01
        if problem.groups > 1 and problem.dtype == "float32" and starts_two_wide_fmas():
            return problem.flops(pass_) / aten_onednn_time.grouped_time(problem, pass_)
        if problem.groups > 1 and pass_ != "forward":
            return 0.02
        if _is_depthwise_of_whole_vectors(problem) and starts_two_wide_fmas():
            return 0.2
        if problem.dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
            return _bfloat16_on_matrix_unit(problem, pass_)
        if problem.dtype == "bfloat16" and torch.cpu._is_avx512_bf16_supported():
            return _bfloat16(problem, pass_)
        if problem.dtype == "float32" and problem.groups == 1 and _falls_to_im2col(problem):
            return _im2col(problem, pass_)
        if problem.dtype == "float32" and problem.groups == 1:
            return _float32(problem, pass_)
    lanes = min(problem.in_channels, problem.out_channels) // problem.groups
    return 0.5 if lanes >= 16 else 0.1


def call_overhead(problem: ConvProblem, pass_: Pass) -> float:
    """What a call of torch's kernels takes longer than one of ours, in times of the problem's FLOPs at peak."""
    return (5e6 if starts_two_wide_fmas() else 5e5) / max(problem.flops(pass_), 1)


def _is_depthwise_of_whole_vectors(problem: ConvProblem) -> bool:
    """What oneDNN has a kernel for that only memory holds up, with few taps sooner than ours."""
    depthwise = problem.groups == problem.in_channels == problem.out_channels and problem.in_channels % 16 == 0
    few = math.prod(problem.kernel_size) <= 27
    return depthwise and few and problem.dtype in ("float32", "float16") and problem.layout == "ndhwc"


def _float32(problem: ConvProblem, pass_: Pass) -> float:
    """All passes of oneDNN without groups.

    Large kernels from few channels reach 0.7 of peak where two wide FMAs start per cycle, 0.6 where windows touch.
    """
    if not starts_two_wide_fmas():
        return _float32_gradient_of_weight(problem) if pass_ == "grad_weight" else _float32_gather(problem, pass_)
    if problem.in_channels <= 4 and math.prod(problem.kernel_size) >= 49:
        reached = 0.6 if pass_ == "forward" and problem.kernel_size == problem.stride else 0.7
        if pass_ == "forward" or (pass_ == "grad_weight" and problem.out_channels < 16):
            return 1 / (1 / reached + 1e8 / problem.flops(pass_))
    time = aten_onednn_time.expected_time(problem, pass_, _inside_share(problem))
    return problem.flops(pass_) / time


def _float32_gather(problem: ConvProblem, pass_: Pass) -> float:
    """Forward and grad_input where one wide FMA starts per cycle.

    With 16 channels and more they run at 0.93 of peak (ncdhw 0.9), channels rounded up to whole vectors of 16, and
    leave out taps that lie in the padding; memory takes the time of 12 FLOPs for each byte to be moved, of 5 where a
    product needs no window. Touching windows are slower, in ncdhw much.
    """
    ndhwc, moved = problem.layout == "ndhwc", problem.min_bytes(pass_) / problem.flops(pass_)
    channels = min(problem.in_channels, problem.out_channels)
    if problem.kernel_size == (1, 1, 1) and (channels >= 16 or ndhwc):
        return 1 / (1 / 0.85 + 5 * moved)
    if channels < 16:
        return 1 / (10 + 12 * moved)
    touching = problem.kernel_size in ((1, 1, 1), problem.stride)
    reached = (0.7 if ndhwc else 0.4) if touching else (0.93 if ndhwc else 0.9)
    return 1 / (_inside_share(problem) / (reached * _used_of_vectors(problem)) + 12 * moved)


def _float32_gradient_of_weight(problem: ConvProblem) -> float:
    """There: in ndhwc nearly as good as ours, and better where much is padding."""
    channels = min(problem.in_channels, problem.out_channels)
    dense = problem.stride == problem.dilation == (1, 1, 1) and min(problem.kernel_size) > 1
    if dense and problem.layout == "ndhwc" and 8 <= channels <= 192:
        return 0.72 * max(_used_of_vectors(problem), 0.5) / _inside_share(problem)
    return 0.1 if channels < 16 else 0.5


def _used_of_vectors(problem: ConvProblem) -> float:
    """Share in use of channels rounded up to whole vectors of 16."""
    return min(count / (-(-count // 16) * 16) for count in (problem.in_channels, problem.out_channels))


def _bfloat16(problem: ConvProblem, pass_: Pass) -> float:
    """The same in bfloat16, with AVX512_BF16: 1.9 of float32 FMA peak, 1.7 for the weight gradient.

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


def _bfloat16_on_matrix_unit(problem: ConvProblem, pass_: Pass) -> float:
    """The same with AMX: 6.7 of float32 FMA peak, 3.7 for the weight gradient, with channels rounded up to whole tiles.

    Then memory weighs most, in ncdhw reorders before and after: in FLOPs a byte takes 22 of a source or result (ncdhw:
    90 and 200), 160 of a weight; in the weight gradient 45 (106) of the input, 240 of the weight.
    """
    ndhwc, flops = problem.layout == "ndhwc", problem.flops(pass_)
    source, target = problem.in_channels, problem.out_channels
    read, written = (2 * math.prod(shape) / flops for shape in (problem.input_shape, problem.output_shape))
    weight = 2 * math.prod(problem.weight_shape) / flops
    if pass_ == "grad_weight":
        started = 1.5e8 / flops
        if max(problem.dilation) > 1:
            return 1 / (1 / 0.27 + started)
        used = _rounded_up(source, 16) * _rounded_up(target, 16)
        return 1 / ((0.27 if ndhwc else 0.33) * used + (45 if ndhwc else 106) * read + 240 * weight + started)
    if pass_ == "grad_input":
        source, target, read, written = target, source, written, read
    if source < 3:
        return 0.1
    computed = 0.15 * _rounded_up(source, 16) * _rounded_up(target, 16) * _inside_share(problem)
    return 1 / (computed + (22 if ndhwc else 90) * read + (22 if ndhwc else 200) * written + 160 * weight)


def _rounded_up(count: int, multiple: int) -> float:
    """How many times as much is computed where a number is rounded up to a multiple."""
    return -(-count // multiple) * multiple / count


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


def _im2col(problem: ConvProblem, pass_: Pass) -> float:
    """That of torch's own columns and a product at 0.7 of peak, for one sample; only the product uses all threads.

    In FLOPs a byte takes 90 of the columns (grad_input 145; none of a single tap with unit stride), 20 of the weight,
    and in ndhwc, which is copied before and after, 80 of the weight, 110 of the input and 75 of the output, 250 where
    gradients are asked for.
    """
    flops = problem.flops(pass_)
    read, written = (4 * math.prod(shape) / flops for shape in (problem.input_shape, problem.output_shape))
    time = 1.4 + (80 if problem.layout == "ndhwc" else 20) * _cheap() * 4 * math.prod(problem.weight_shape) / flops
    if problem.kernel_size != (1, 1, 1) or problem.stride != (1, 1, 1):
        columns = math.prod(problem.kernel_size) * problem.in_channels / problem.out_channels * written
        time += (145 if pass_ == "grad_input" else 90) * _cheap() * columns
    if problem.layout == "ndhwc":
        time += _cheap() * (110 * read + (75 if pass_ == "forward" else 250) * written)
    return 1 / time


def _cheap() -> float:
    """How many more FLOPs start in the time of a byte than where one wide FMA starts per cycle, over those of two."""
    return 1.0 if starts_two_wide_fmas() else 0.4


def _has_float16() -> bool:
    """Whether oneDNN has float16 kernels for this processor (those of avx512_fp16 and above)."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
