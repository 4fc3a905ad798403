"""Instance or batch normalization and the activation behind it in one pass, from csrc/algorithm/instance_norm_*.h.

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
    batch: bool,
    planar_result: bool,
    eps: float,
    activation: Activation,
    negative_slope: float,
    slopes: int,
) -> _C.InstanceNorm:
    samples, channels, *size = shape
    voxels = size[0] * size[1] * size[2]
    sharing = samples if batch else 1
    if channels_last:
        # With channels innermost, the voxels of samples that share statistics are those of one sample.
        samples, voxels, sharing = samples // sharing, voxels * sharing, 1
    plan: _C.InstanceNorm = kernels().InstanceNorm(
        samples=samples if channels_last else samples * channels,
        voxels=voxels,
        channels=channels if channels_last else 1,
        sharing=sharing,
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
    batch: bool,
    slopes: Tensor | None,
    eps: float,
    activation: Activation,
    negative_slope: float,
    planar_result: bool = False,
) -> _C.InstanceNorm:
    count = 0 if slopes is None else slopes.numel()
    return _plan(tuple(x.shape), layout == "ndhwc", batch, planar_result, eps, activation, negative_slope, count)


def forward(
    x: Tensor,
    layout: Layout,
    result_layout: Layout,
    batch: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    eps: float,
    activation: Activation,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """The result, and what `backward` takes: mean, 1 / sqrt(variance + eps) and variance of each plane, in float64.

    The statistics are (3, N * C), or with `batch` in "ndhwc" (3, C).

    Args:
        x: (N, C, D, H, W), dense in `layout`.
        layout: of x.
        result_layout: of the result: that of x, or "ncdhw", which `batch` does not have for "ndhwc".
        batch: whether all samples share the statistics of a channel: batch normalization.
        weight, bias: (C,) or None.
        slopes: PReLU's weight, (1,) or (C,), in place of `activation`; or None.
        eps: added to the variance.
        activation: none, relu or leaky_relu.
        negative_slope: of leaky_relu.
    """
    plan = _plan_of(x, layout, batch, slopes, eps, activation, negative_slope, layout != result_layout)
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=MEMORY_FORMAT[result_layout])
    planes = x.shape[1] if batch and layout == "ndhwc" else x.shape[0] * x.shape[1]
    statistics = torch.empty(3, planes, dtype=torch.float64)
    options = (x.dtype == torch.float64,)
    call(kernels().instance_norm_forward, plan, x, weight, bias, slopes, y, statistics, options=options)
    return y, statistics


def backward(
    grad: Tensor,
    x: Tensor,
    layout: Layout,
    batch: bool,
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
        x, layout, batch, weight, slopes, eps, activation, negative_slope: as `forward` took them.
        bias: as `forward` took it, or None without an activation.
    """
    plan = _plan_of(x, layout, batch, slopes, eps, activation, negative_slope)
    grad_x = torch.empty(x.shape, dtype=x.dtype, memory_format=MEMORY_FORMAT[layout]) if wanted[0] else None
    sizes = (x.shape[1], x.shape[1], 0 if slopes is None else slopes.numel())
    parameters = [
        torch.empty(size, dtype=x.dtype) if is_wanted else None
        for size, is_wanted in zip(sizes, wanted[1:], strict=True)
    ]
    operands = (grad, x, weight, bias, slopes, statistics, grad_x, *parameters)
    call(kernels().instance_norm_backward, plan, *operands, options=(x.dtype == torch.float64,))
    return grad_x, *parameters


def update_running_statistics(
    x: Tensor, layout: Layout, statistics: Tensor, factor: float, mean: Tensor, variance: Tensor
) -> None:
    """Have the running statistics of a batch normalization follow, as torch's do; their versions stay as they are.

    Args:
        x: what was normalized, with more than one voxel in each channel.
        layout: of x.
        statistics: what `forward` returned with `batch`.
        factor: the share of this batch.
        mean, variance: the running statistics, (C,), dense, of the dtype of x; changed in place.
    """
    plan = _plan_of(x, layout, True, None, 0.0, "none", 0.0)
    options = (x.dtype == torch.float64, factor)
    call(kernels().update_running_statistics, plan, statistics, mean, variance, options=options)
