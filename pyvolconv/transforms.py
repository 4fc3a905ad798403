"""What vmap, autocast and the FLOP counter need to know of the three operators.

vmap: a mapped axis of size B becomes part of the batch, or of the channels of each group. With x and w both
mapped the B convolutions are independent, which is one convolution with B times the groups. So every rule
is a reshape, one call of the same operator, and a reshape back; no loop over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import DEVICES, KEYS, dtype_in_autocast
from .ops import conv3d, conv3d_grad_input, conv3d_grad_weight, conv3d_problem, library


def _into_batch(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).flatten(0, 1)


def _from_batch(tensor: Tensor, size: int) -> Tensor:
    return torch.unflatten(tensor, 0, (size, -1))


def _into_channels(tensor: Tensor, axis: int, channel: int, groups: int) -> Tensor:
    """Channels (g, c) and a mapped axis b become channels (g, b, c)."""
    grouped = torch.unflatten(tensor.movedim(axis, 0), channel + 1, (groups, -1))
    return grouped.movedim(0, channel + 1).flatten(channel, channel + 2)


def _from_channels(tensor: Tensor, size: int, channel: int, groups: int) -> Tensor:
    """Channels (g, b, c) become channels (g, c) and a leading axis b."""
    grouped = torch.unflatten(tensor, channel, (groups, size, -1))
    return grouped.movedim(channel + 1, 0).flatten(channel + 1, channel + 2)


def _into_groups(tensor: Tensor, axis: int | None, channel: int, size: int) -> Tensor:
    """A mapped axis b and channels c become channels (b, c); an unmapped tensor is repeated."""
    mapped = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return mapped.movedim(0, channel).flatten(channel, channel + 1)


def _from_groups(tensor: Tensor, size: int, channel: int) -> Tensor:
    return torch.unflatten(tensor, channel, (size, -1)).movedim(channel, 0)


def _vmap_conv3d(
    info: Any, in_dims: Sequence[Any], x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, int]:
    x_axis, weight_axis, bias_axis, *_ = in_dims
    size, groups = info.batch_size, geometry[3]
    if weight_axis is None and x_axis is None:
        y = conv3d(x, weight, None, *geometry).expand(size, -1, -1, -1, -1, -1)
    elif weight_axis is None:
        y = _from_batch(conv3d(_into_batch(x, x_axis), weight, None, *geometry), size)
    elif x_axis is None:
        y = conv3d(x, _into_channels(weight, weight_axis, 0, groups), None, *geometry)
        y = _from_channels(y, size, 1, groups)
    else:
        x, weight = _into_groups(x, x_axis, 1, size), _into_groups(weight, weight_axis, 0, size)
        y = _from_groups(conv3d(x, weight, None, *geometry[:3], groups * size), size, 1)
    if bias is not None:
        rows = bias.movedim(bias_axis, 0) if bias_axis is not None else bias.unsqueeze(0)
        y = y + rows[:, None, :, None, None, None]
    return y, 0


def _vmap_conv3d_grad_input(
    info: Any, in_dims: Sequence[Any], grad_output: Tensor, weight: Tensor, *sizes: Any
) -> tuple[Tensor, int]:
    grad_axis, weight_axis, *_ = in_dims
    size, groups = info.batch_size, sizes[-1]
    if weight_axis is None:
        return _from_batch(conv3d_grad_input(_into_batch(grad_output, grad_axis), weight, *sizes), size), 0
    if grad_axis is None:
        folded = weight.movedim(weight_axis, 0).movedim(0, 1).flatten(1, 2)
        return _from_channels(conv3d_grad_input(grad_output, folded, *sizes), size, 1, groups), 0
    grad_output, weight = _into_groups(grad_output, grad_axis, 1, size), _into_groups(weight, weight_axis, 0, size)
    return _from_groups(conv3d_grad_input(grad_output, weight, *sizes[:-1], groups * size), size, 1), 0


def _vmap_conv3d_grad_weight(
    info: Any, in_dims: Sequence[Any], grad_output: Tensor, x: Tensor, *sizes: Any
) -> tuple[Tensor, int]:
    grad_axis, x_axis, *_ = in_dims
    size, groups = info.batch_size, sizes[-1]
    if x_axis is None:
        folded = _into_channels(grad_output, grad_axis, 1, groups)
        return _from_channels(conv3d_grad_weight(folded, x, *sizes), size, 0, groups), 0
    if grad_axis is None:
        grad_weight = conv3d_grad_weight(grad_output, _into_channels(x, x_axis, 1, groups), *sizes)
        return _from_groups(grad_weight, size, 1), 0
    grad_output, x = _into_groups(grad_output, grad_axis, 1, size), _into_groups(x, x_axis, 1, size)
    return _from_groups(conv3d_grad_weight(grad_output, x, *sizes[:-1], groups * size), size, 0), 0


def autocast_kernel(operator: Any, device_type: str) -> Callable[..., Tensor]:
    """The operator's kernel at the Autocast key: it casts operands, as torch's lower-precision list does."""

    def cast(argument: Any) -> Any:
        return argument.to(dtype_in_autocast(argument)) if isinstance(argument, Tensor) else argument

    def kernel(*args: Any) -> Tensor:
        cast_args = [cast(argument) for argument in args]
        with torch._C._ExcludeDispatchKeyGuard(KEYS[device_type]):
            return operator(*cast_args)  # type: ignore[no-any-return]

    return kernel


def flops_conv3d(x: Sequence[int], weight: Sequence[int], bias: Any, *geometry: Any, **_: Any) -> int:
    return _flops(x, weight, geometry)


def flops_conv3d_grad_input(
    grad_output: Sequence[int], weight: Sequence[int], input_size: Sequence[int], *geometry: Any, **_: Any
) -> int:
    return _flops([grad_output[0], weight[1] * geometry[3], *input_size], weight, geometry)


def flops_conv3d_grad_weight(
    grad_output: Sequence[int], x: Sequence[int], kernel_size: Sequence[int], *geometry: Any, **_: Any
) -> int:
    return _flops(x, [grad_output[1], x[1] // geometry[3], *kernel_size], geometry)


def _flops(input_shape: Sequence[int], weight_shape: Sequence[int], geometry: Any) -> int:
    like = torch.empty(0, device="meta")
    return conv3d_problem(input_shape, weight_shape, geometry, like, "ncdhw").flops("forward")


for _operator, _vmap, _count in (
    (conv3d, _vmap_conv3d, flops_conv3d),
    (conv3d_grad_input, _vmap_conv3d_grad_input, flops_conv3d_grad_input),
    (conv3d_grad_weight, _vmap_conv3d_grad_weight, flops_conv3d_grad_weight),
):
    torch.library.register_vmap(_operator, _vmap, lib=library)
    register_flop_formula(_operator.overloadpacket)(_count)
    for _device in DEVICES:
        library.impl(_operator, autocast_kernel(_operator, _device), f"Autocast{_device.upper()}")
