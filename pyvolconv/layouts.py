"""Ordinary tensors brought from one layout into the other, differentiably, without torch's slower copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.base import MEMORY_FORMAT
from .backends.cpp_reorder import reorder
from .ops import layout_of
from .ordinary import is_ordinary
from .problem import Layout
from .shortcut import is_differentiated

_OTHER: dict[Layout, Layout] = {"ncdhw": "ndhwc", "ndhwc": "ncdhw"}


class _ReorderFunction(torch.autograd.Function):
    """Autograd node of a copy in another layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return reorder(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return in_layout(grad, _OTHER[ctx.layout]), None


def in_layout(x: Tensor, layout: Layout) -> Tensor:
    """`x`, or a copy of it, dense in a layout and recognized as such (`ops.layout_of`).

    Args:
        x: (N, C, D, H, W), of any strides.
        layout: "ncdhw" or "ndhwc".

    Example:
        >>> import torch
        >>> in_layout(torch.zeros(2, 3, 4, 5, 6), "ndhwc").is_contiguous(memory_format=torch.channels_last_3d)
        True
    """
    if x.is_contiguous(memory_format=MEMORY_FORMAT[layout]) and layout_of(x) == layout:
        return x
    fits = x.is_contiguous(memory_format=MEMORY_FORMAT[_OTHER[layout]]) and x.dtype in (torch.float32, torch.float64)
    if not fits or not x.is_cpu or not is_ordinary(x, under_profiler=True):
        return x.contiguous(memory_format=MEMORY_FORMAT[layout])
    if not is_differentiated(x):
        return reorder(x, layout)
    y: Tensor = _ReorderFunction.apply(x, layout)  # type: ignore[no-untyped-call]
    return y
