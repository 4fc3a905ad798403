"""Instance normalization and the activation behind it in one pass, from csrc/algorithm/instance_norm_*.h.

Tensors arrive dense in one layout, float32 or float64, on the CPU, with more than one voxel; weight, bias and PReLU's
weights are dense vectors of the same dtype, or None.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..epilogue import Activation
from ..problem import Layout
from .base import MEMORY_FORMAT
from .cpp import call, kernels, load_extension

if TYPE_CHECKING:
    from .. import _C


def is_available() -> bool:
    """Whether the compiled module is there.

    Raises:
        ValueError: PYVOLCONV_ISA names no instruction set of the build.
    """
    return load_extension()[0] is not None


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    channels_last: bool,
    planar_result: bool,
    eps: float,
    activation: Activation,
    negative_slope: float,
    slopes: int,
) -> _C.InstanceNorm:
    samples, channels, *size = shape
    voxels = size[0] * size[1] * size[2]
    plan: _C.InstanceNorm = kernels().InstanceNorm(
        samples=samples if channels_last else samples * channels,
        voxels=voxels,
        channels=channels if channels_last else 1,
        parameters=channels,
        eps=eps,
        activation=activation,
        negative_slope=negative_slope,
        slopes=slopes,
        planar_result=planar_result,
    )
    return plan


def _plan_of(
    x: Tensor,
    layout: Layout,
    slopes: Tensor | None,
    eps: float,
    activation: Activation,
    negative_slope: float,
    planar_result: bool = False,
) -> _C.InstanceNorm:
    count = 0 if slopes is None else slopes.numel()
    return _plan(tuple(x.shape), layout == "ndhwc", planar_result, eps, activation, negative_slope, count)


def forward(
    x: Tensor,
    layout: Layout,
    result_layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    eps: float,
    activation: Activation,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """The result, and what `backward` takes: mean and 1 / sqrt(variance + eps) of each plane, (2, N * C) in float64.

    Args:
        x: (N, C, D, H, W), dense in `layout`.
        layout: of x.
        result_layout: of the result: that of x, or "ncdhw".
        weight, bias: (C,) or None.
        slopes: PReLU's weight, (1,) or (C,), in place of `activation`; or None.
        eps: added to the variance.
        activation: none, relu or leaky_relu.
        negative_slope: of leaky_relu.
    """
    plan = _plan_of(x, layout, slopes, eps, activation, negative_slope, layout != result_layout)
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=MEMORY_FORMAT[result_layout])
    statistics = torch.empty(2, x.shape[0] * x.shape[1], dtype=torch.float64)
    options = (x.dtype == torch.float64,)
    call(kernels().instance_norm_forward, plan, x, weight, bias, slopes, y, statistics, options=options)
    return y, statistics


def backward(
    grad: Tensor,
    x: Tensor,
    layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    statistics: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    eps: float,
    activation: Activation,
    negative_slope: float,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and slopes that are wanted; None for others.

    Args:
        grad: of the result, dense in `layout`.
        statistics: what `forward` returned.
        wanted: which gradients.
        x, layout, weight, bias, slopes, eps, activation, negative_slope: as `forward` took them.
    """
    plan = _plan_of(x, layout, slopes, eps, activation, negative_slope)
    grad_x = torch.empty(x.shape, dtype=x.dtype, memory_format=MEMORY_FORMAT[layout]) if wanted[0] else None
    parameters = [
        torch.empty(operand.shape, dtype=x.dtype) if operand is not None and is_wanted else None
        for operand, is_wanted in zip((weight, bias, slopes), wanted[1:], strict=True)
    ]
    operands = (grad, x, weight, bias, slopes, statistics, grad_x, *parameters)
    call(kernels().instance_norm_backward, plan, *operands, options=(x.dtype == torch.float64,))
    return grad_x, *parameters
