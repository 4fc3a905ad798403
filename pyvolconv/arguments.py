"""What the arguments of `conv3d` and `conv_transpose3d` come to; what torch refuses is None here, for torch to name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .autocast import dtype_in_autocast
from .problem import DTYPE_BYTES

Sizes = int | Sequence[int]
Padding = str | Sizes | Sequence[Sequence[int]]

LARGEST = 2**63 - 1
"""What counts voxels, in torch and in the kernels, goes this far."""
LARGEST_PADDING = 2**62 - 1
"""Torch refuses more, by name."""
HUGE = 2**31
"""Steps up to this one may be multiplied by strides of tensors in memory."""


def triple(value: Any) -> tuple[int, int, int] | None:
    """Three ints out of what torch accepts for them, or None."""
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    sizes = tuple(int(size) if isinstance(size, np.integer) else size for size in sizes)
    if not all(isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) for size in sizes):
        return None
    if any(isinstance(size, int) and not -LARGEST <= size <= LARGEST for size in sizes):
        return None
    if len(sizes) == 1:
        return sizes * 3
    return sizes if len(sizes) == 3 else None


def padding_of_pairs(padding: Any) -> tuple[int, ...] | None:
    """Six numbers, none negative, out of three pairs (begin, end); None for anything else."""
    if not isinstance(padding, (tuple, list)) or len(padding) != 3:
        return None
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in padding):
        return None
    begins, ends = triple([pair[0] for pair in padding]), triple([pair[1] for pair in padding])
    if begins is None or ends is None or min(*begins, *ends) < 0:
        return None
    return tuple(side for pair in zip(begins, ends, strict=True) for side in pair)


def _are_operands(input: Any, weight: Any, bias: Any, out_channels_axis: int, groups: Any) -> bool:
    """Whether tensors and groups fit one another; what does not is left to torch to name."""
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor) or input.is_nested or weight.is_nested:
        return False
    dtype = dtype_in_autocast(input)
    if not isinstance(groups, int) or isinstance(groups, bool) or str(dtype).removeprefix("torch.") not in DTYPE_BYTES:
        return False
    if input.dim() not in (4, 5) or weight.dim() != 5 or groups < 1 or input.device.type not in ("cpu", "cuda", "meta"):
        return False
    if weight.device != input.device or weight.layout != torch.strided or input.layout != torch.strided:
        return False
    channels = weight.shape[out_channels_axis] * (groups if out_channels_axis == 1 else 1)
    if bias is not None and (
        not isinstance(bias, Tensor) or bias.dim() != 1 or bias.shape[0] != channels or bias.device != input.device
    ):
        return False
    if weight.shape[0] == 0 or weight.shape[0] % groups or min(weight.shape[2:]) < 1:
        return False
    # DTensor and its like hold other tensors, and know what torch's operators do with those.
    if any(is_traceable_wrapper_subclass(operand) for operand in (input, weight)):
        return False
    return dtype_in_autocast(weight) == dtype and (bias is None or dtype_in_autocast(bias) == dtype)


def conv3d_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[Any, ...] | None:
    """(stride, padding as six numbers, dilation, groups), or None for arguments that torch refuses."""
    stride, dilation = triple(stride), triple(dilation)
    if stride is None or dilation is None or not _are_operands(input, weight, bias, 0, groups):
        return None
    if min(stride) < 1 or min(dilation) < 1 or input.shape[-4] != weight.shape[1] * groups or weight.shape[1] == 0:
        return None
    kernel_size, input_size = weight.shape[2:], input.shape[-3:]
    padded = []
    pairs: Sequence[int] | None = padding_of_pairs(padding)
    if padding == "same" and stride == (1, 1, 1):
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        pairs = [side for total in totals for side in (total // 2, total - total // 2)]
    elif pairs is None:
        sides = (0, 0, 0) if padding == "valid" else triple(padding)
        if sides is None or min(sides) < 0:
            return None
        pairs = [side for both in sides for side in (both, both)]
    for axis in range(3):
        size = input_size[axis] + pairs[2 * axis] + pairs[2 * axis + 1]
        if input_size[axis] == 0 or size < dilation[axis] * (kernel_size[axis] - 1) + 1:
            return None
        padded.append(size)
    if max(pairs) > LARGEST_PADDING:
        return None
    _check_sizes(padded)
    return _steps(stride, padded), tuple(pairs), _steps(dilation, padded), groups


def conv_transpose3d_sizes(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> tuple[list[int], tuple[Any, ...], list[int]] | None:
    """(size computed, geometry of the convolution, zeros to append), or None for what torch refuses.

    The convolution must map the result's size to the input's size exactly, so output_padding first takes
    away from the padding at the end, then uses the remainder that a stride discards; what is still left
    (output_padding >= stride + padding) no tap reaches, and it is appended.
    """
    stride, padding, dilation = triple(stride), triple(padding), triple(dilation)
    extra = triple(output_padding)
    if stride is None or padding is None or dilation is None or extra is None:
        return None
    if not _are_operands(input, weight, bias, 1, groups) or input.shape[-4] != weight.shape[0] or weight.shape[1] == 0:
        return None
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0 or min(extra) < 0 or min(input.shape[-3:]) < 1:
        return None
    size: list[int] = []
    pairs: list[int] = []
    missing: list[int] = []
    padded: list[int] = []
    for axis in range(3):
        s, p, d, e = stride[axis], padding[axis], dilation[axis], extra[axis]
        if e >= s and e >= d:
            return None
        end = max(p - e, 0)
        reached = min(e - p + end, s - 1)
        missing = [0, e - p + end - reached, *missing]
        pairs += [p, end]
        size.append((input.shape[axis - 3] - 1) * s + d * (weight.shape[2 + axis] - 1) + 1 - p - end + reached)
        padded.append(size[-1] + p + end)
        if size[-1] < 1:
            return None
    _check_sizes([*padded, *missing])
    return size, (_steps(stride, padded), tuple(pairs), _steps(dilation, padded), groups), missing


def _check_sizes(sizes: Sequence[Any]) -> None:
    """Torch raises RuntimeError too, where it does not wrap around."""
    for size in sizes:
        if isinstance(size, int) and size > LARGEST:
            raise RuntimeError(f"{size} voxels along an axis, padding included, are more than a tensor has")


def _steps(steps: tuple[int, int, int], padded: Sequence[Any]) -> tuple[int, int, int]:
    """Strides or dilations, huge ones cut to the padded size: from there on no second step is within it."""
    if max(steps) <= HUGE:
        return steps
    depth, height, width = (min(step, size) if step > HUGE else step for step, size in zip(steps, padded, strict=True))
    return depth, height, width
