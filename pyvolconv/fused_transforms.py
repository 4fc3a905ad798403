"""What vmap, autocast and the FLOP counter need to know of the fused operators.

vmap: where only activations are mapped, the mapped axis becomes part of the batch. Else every operand gets the axis and
it becomes the outermost part of the groups: independent convolutions are one with as many times the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import DEVICES
from .fused_ops import (
    conv3d_max_pool,
    conv3d_max_pool_grad_input,
    conv3d_max_pool_grad_weight,
)
from .ops import library
from .transforms import autocast_kernel, flops_conv3d, flops_conv3d_grad_input, flops_conv3d_grad_weight


def fold(tensor: Tensor, axis: int | None, into: int, size: int) -> Tensor:
    """A mapped axis b in front of axis `into`, as one axis (b, into); an unmapped tensor is repeated."""
    mapped = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return mapped.movedim(0, into).flatten(into, into + 1)


def unfold(tensor: Tensor, size: int, axis: int) -> Tensor:
    """The inverse: the mapped axis leads."""
    return torch.unflatten(tensor, axis, (size, -1)).movedim(axis, 0)


def more_groups(sizes: Sequence[Any], factor: int) -> tuple[Any, ...]:
    """(stride, padding, dilation, groups, ...) with `factor` times the groups."""
    return (*sizes[:3], sizes[3] * factor, *sizes[4:])


def _vmap_conv3d_max_pool(
    info: Any, in_dims: Sequence[Any], x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    x_axis, weight_axis, bias_axis, *_ = in_dims
    size = info.batch_size
    if weight_axis is None and bias_axis is None:
        results, axis = conv3d_max_pool(fold(x, x_axis, 0, size), weight, bias, *sizes), 0
    else:
        x, weight = fold(x, x_axis, 1, size), fold(weight, weight_axis, 0, size)
        bias = None if bias is None else fold(bias, bias_axis, 0, size)
        results, axis = conv3d_max_pool(x, weight, bias, *more_groups(sizes, size)), 1
    value, code = (unfold(result, size, axis) for result in results)
    return (value, code), (0, 0)


def _vmap_conv3d_max_pool_grad_input(
    info: Any, in_dims: Sequence[Any], grad: Tensor, code: Tensor, weight: Tensor, input_size: Any, *sizes: Any
) -> tuple[Tensor, int]:
    grad_axis, code_axis, weight_axis, *_ = in_dims
    size = info.batch_size
    into = 0 if weight_axis is None else 1
    grad, code = fold(grad, grad_axis, into, size), fold(code, code_axis, into, size)
    if weight_axis is not None:
        weight, sizes = fold(weight, weight_axis, 0, size), more_groups(sizes, size)
    return unfold(conv3d_max_pool_grad_input(grad, code, weight, input_size, *sizes), size, into), 0


def _vmap_conv3d_max_pool_grad_weight(
    info: Any, in_dims: Sequence[Any], grad: Tensor, code: Tensor, x: Tensor, kernel_size: Any, bias: bool, *sizes: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    operands = [fold(tensor, axis, 1, size) for tensor, axis in zip((grad, code, x), in_dims, strict=False)]
    results = conv3d_max_pool_grad_weight(*operands, kernel_size, bias, *more_groups(sizes, size))
    of_weight, of_bias = (unfold(result, size, 0) for result in results)
    return (of_weight, of_bias), (0, 0)


# The FLOPs of the definition, as for every other algorithm: a fused model counts what the same one without pyvolconv
# does, though the gradients visit chosen voxels only. `cost` counts what is computed.
def _flops_conv3d_max_pool(x: Sequence[int], weight: Sequence[int], bias: Any, *sizes: Any, **_: Any) -> int:
    return flops_conv3d(x, weight, bias, *sizes[:4])


def _flops_conv3d_max_pool_grad_input(
    grad: Sequence[int], code: Any, weight: Sequence[int], input_size: Sequence[int], *sizes: Any, **_: Any
) -> int:
    return flops_conv3d_grad_input(grad, weight, input_size, *sizes[:4])


def _flops_conv3d_max_pool_grad_weight(
    grad: Sequence[int], code: Any, x: Sequence[int], kernel_size: Sequence[int], bias: bool, *sizes: Any, **_: Any
) -> int:
    return flops_conv3d_grad_weight(grad, x, kernel_size, *sizes[:4])


for _operator, _vmap, _count in (
    (conv3d_max_pool, _vmap_conv3d_max_pool, _flops_conv3d_max_pool),
    (conv3d_max_pool_grad_input, _vmap_conv3d_max_pool_grad_input, _flops_conv3d_max_pool_grad_input),
    (conv3d_max_pool_grad_weight, _vmap_conv3d_max_pool_grad_weight, _flops_conv3d_max_pool_grad_weight),
):
    torch.library.register_vmap(_operator, _vmap, lib=library)
    register_flop_formula(_operator.overloadpacket)(_count)
    for _device in DEVICES:
        library.impl(_operator, autocast_kernel(_operator, _device), f"Autocast{_device.upper()}")
