"""`conv3d_activation`: convolution, residual and activation as one function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import activation_transforms as activation_transforms
from .activation_derivatives import ActivationFunction
from .activation_ops import conv3d_activation as operator
from .activation_ops import run_activation
from .arguments import Padding, Sizes, conv3d_arguments
from .autocast import dtype_in_autocast, is_hidden_by_vmap, outside_autocast
from .elsewhere import is_recorded_for_elsewhere
from .epilogue import KEEPS_PREACTIVATION, NEGATIVE_SLOPE, Activation, check_activation
from .functional import conv3d
from .fused_ops import APPLY, dense_size
from .ordinary import is_ordinary
from .shortcut import Conv3dCall, is_differentiated, plain_call, remembered


def conv3d_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    activation: Activation = "relu",
    negative_slope: float = NEGATIVE_SLOPE,
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(conv3d(input, weight, bias) + residual)` in one pass.

    What the activation is applied to is written nowhere, or, on the CPU, in the result's place. Derivatives of every
    order, in both modes. For them a relu keeps its result, as `torch.relu` does, and a leaky_relu a byte per value, so
    that its result may be changed in place; silu and gelu keep what they are applied to.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as for `conv3d`.
        activation: "none", "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh" (gelu with approximate="tanh").
        negative_slope: of leaky_relu, not negative.
        residual: of the result's shape and dtype, with any strides. Another one that can be added to the convolution's
            result is: torch then computes sum and activation.

    Returns:
        (N, C_out, D_out, H_out, W_out), in channels_last_3d when `input` or `weight` is.

    Raises:
        RuntimeError, TypeError, ValueError: those of `torch.nn.functional.conv3d` for its arguments, and of an addition
            for the residual.
        ValueError: activation or slope are impossible, in words that say what is expected.

    Example:
        >>> import torch, pyvolconv
        >>> x, w = torch.randn(2, 3, 8, 8, 8), torch.randn(3, 3, 3, 3, 3)
        >>> y = pyvolconv.conv3d_activation(x, w, padding=1, activation="silu", residual=x)
        >>> y.shape
        torch.Size([2, 3, 8, 8, 8])
    """
    operands = (input, weight, bias)
    if has_torch_function_variadic(*operands, residual):
        return handle_torch_function(
            conv3d_activation,
            (*operands, residual),
            *(*operands, stride, padding, dilation, groups),
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )
    geometry = (stride, padding, dilation, groups)
    call = remembered(_calls, _activated_call, *operands, *geometry, activation, negative_slope)
    if call is not None and (residual is None or call.takes(residual)):
        return call(*operands, residual)
    if is_hidden_by_vmap():
        with outside_autocast():
            return _by_the_operator(*operands, geometry, activation, negative_slope, residual)
    return _by_the_operator(*operands, geometry, activation, negative_slope, residual)


def _by_the_operator(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    activation: Activation,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    y: Tensor
    check_activation(activation, negative_slope)
    args = None if is_recorded_for_elsewhere() else conv3d_arguments(input, weight, bias, *geometry)
    if args is None or not dtype_in_autocast(input).is_floating_point or not _fits(residual, input, weight, args):
        y = conv3d(input, weight, bias, *geometry)
        return APPLY[activation](y if residual is None else y + residual, negative_slope)
    batched = input if input.dim() == 5 else input.unsqueeze(0)
    residual = residual.unsqueeze(0) if residual is not None and input.dim() == 4 else residual
    y = operator(batched, weight, bias, residual, *args, activation, negative_slope)
    return y if input.dim() == 5 else y.squeeze(0)


def _fits(residual: Tensor | None, input: Tensor, weight: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether the residual of a convolution that `conv3d_arguments` took has its result's shape and dtype."""
    if residual is None:
        return True
    # DTensor and its like know what torch's operators do with what they hold.
    holds_others = is_traceable_wrapper_subclass(residual)
    if not isinstance(residual, Tensor) or residual.is_nested or holds_others:
        return False
    shape = (*input.shape[:-4], weight.shape[0], *dense_size(input.shape[-3:], weight.shape[2:], args))
    is_alike = residual.dtype == dtype_in_autocast(input) and residual.device == input.device
    return is_alike and residual.layout == input.layout and tuple(residual.shape) == shape


@dataclass(frozen=True)
class _ActivatedCall:
    """`conv3d_activation` of operands that fit the problem of `plain`; `shortcut` says what this is for."""

    plain: Conv3dCall
    activation: Activation
    negative_slope: float

    def takes(self, residual: Any) -> bool:
        """Whether a residual is as ordinary as the operands, and like the result."""
        if not isinstance(residual, Tensor) or not is_ordinary(residual):
            return False
        problem = self.plain.problem
        return residual.shape == problem.output_shape and residual.dtype == getattr(torch, problem.dtype)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y: Tensor
        operands = (x, weight, bias, residual)
        if not is_differentiated(*operands):
            return self.run(*operands)
        if self.activation in KEEPS_PREACTIVATION:
            y = self.plain(x, weight, bias)
            return APPLY[self.activation](y if residual is None else y.add_(residual), self.negative_slope)
        sizes = (*self.plain.args, self.activation, self.negative_slope)
        y = ActivationFunction.apply(self.run, *operands, *sizes)  # type: ignore[attr-defined]
        return y

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any) -> Tensor:
        """The result alone."""
        return run_activation(self.plain.problem, x, weight, bias, residual, self.activation, self.negative_slope)


_calls: dict[Any, _ActivatedCall | None] = {}


def _activated_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Activation,
    negative_slope: float,
) -> _ActivatedCall | None:
    check_activation(activation, negative_slope)
    plain = plain_call(input, weight, bias, stride, padding, dilation, groups)
    if plain is None or not input.is_floating_point():
        return None
    return _ActivatedCall(plain, activation, negative_slope)
