"""Convolution, residual and activation as one pass: a torch operator.

    y = conv3d_activation(x, weight, bias, residual, ..., activation, negative_slope)
      = activation(conv3d(x, weight, bias) + residual)

for floating-point dtypes; the residual has the shape and dtype of y. What comes before the activation never exists in
memory where a backend applies it to results in registers; elsewhere it is applied in their place (`backends/base.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.base import MEMORY_FORMAT, activate_in_place
from .dispatch import choose, run
from .epilogue import Activation
from .fused_ops import APPLY
from .ops import conv3d, conv3d_problem, fake_conv3d, kernel_of, layout_of, library, require
from .problem import ConvProblem

library.define(
    "conv3d_activation(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation, float negative_slope) -> Tensor"
)
conv3d_activation = torch.ops.pyvolconv.conv3d_activation.default


def _run_conv3d_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    *geometry, activation, slope = rest
    layout = layout_of(x, weight)
    memory_format = MEMORY_FORMAT[layout]
    if x.numel() == 0 or weight.numel() == 0:
        y = kernel_of(conv3d)(x, weight, bias, *geometry)
        return activate_in_place(y if residual is None else y.add_(residual), activation, slope)
    problem = conv3d_problem(x.shape, weight.shape, tuple(geometry), x, layout, bias is not None)
    require(problem, weight, problem.weight_shape, x)
    if bias is not None:
        require(problem, bias, (problem.out_channels,), x)
    if residual is not None:
        require(problem, residual, problem.output_shape, x)
    x, weight = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
    bias = None if bias is None else bias.contiguous()
    return run_activation(problem, x, weight, bias, residual, activation, slope)


def run_activation(
    problem: ConvProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    slope: float,
) -> Tensor:
    """The pass of operands that fit the problem, dense in its layout; the residual may have any strides."""
    if residual is not None:
        residual = residual.contiguous(memory_format=MEMORY_FORMAT[problem.layout])
    method = choose(problem, "forward").forward_epilogue
    return run(method, problem, "forward", x, weight, bias, residual, activation, slope)


def put_together_conv3d_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    """What the operator returns, by the plain pass and torch's functions."""
    *geometry, activation, slope = rest
    y = conv3d(x, weight, bias, *geometry)
    return APPLY[activation](y if residual is None else y + residual, slope)


def _fake_conv3d_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    return fake_conv3d(x, weight, bias, *rest[:4])


library.impl(conv3d_activation, _run_conv3d_activation, "CompositeExplicitAutograd")
torch.library.register_fake(conv3d_activation, _fake_conv3d_activation, lib=library)
