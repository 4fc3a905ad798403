"""What vmap, autocast and the FLOP counter need to know of `conv3d_activation`; the rules are those of `conv3d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .activation_ops import conv3d_activation
from .autocast import DEVICES
from .fused_transforms import fold, more_groups, unfold
from .ops import library
from .transforms import autocast_kernel, flops_conv3d


def _vmap(
    info: Any,
    in_dims: Sequence[Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *sizes: Any,
) -> tuple[Tensor, int]:
    x_axis, weight_axis, bias_axis, residual_axis, *_ = in_dims
    size = info.batch_size
    into = 0 if weight_axis is None and bias_axis is None else 1
    if into:
        weight, sizes = fold(weight, weight_axis, 0, size), more_groups(sizes, size)
        bias = None if bias is None else fold(bias, bias_axis, 0, size)
    residual = None if residual is None else fold(residual, residual_axis, into, size)
    return unfold(conv3d_activation(fold(x, x_axis, into, size), weight, bias, residual, *sizes), size, into), 0


def _count(x: Sequence[int], weight: Sequence[int], bias: Any, residual: Any, *sizes: Any, **_: Any) -> int:
    return flops_conv3d(x, weight, bias, *sizes[:4])


torch.library.register_vmap(conv3d_activation, _vmap, lib=library)
register_flop_formula(conv3d_activation.overloadpacket)(_count)
for _device in DEVICES:
    library.impl(conv3d_activation, autocast_kernel(conv3d_activation, _device), f"Autocast{_device.upper()}")
