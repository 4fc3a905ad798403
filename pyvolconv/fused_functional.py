"""`conv3d_max_pool`: convolution, activation and max-pool as one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import fused_derivatives as fused_derivatives
from . import fused_ops
from . import fused_transforms as fused_transforms
from .arguments import Padding, Sizes, conv3d_arguments, triple
from .autocast import is_hidden_by_vmap, outside_autocast
from .dispatch import choose_fused_or_none, run
from .elsewhere import is_recorded_for_elsewhere
from .epilogue import KEEPS_PREACTIVATION, NEGATIVE_SLOPE, Activation, MaxPool, check_activation
from .functional import conv3d
from .problem import ConvProblem
from .shortcut import is_differentiated, plain_call, remembered


def conv3d_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    activation: Activation = "none",
    negative_slope: float = NEGATIVE_SLOPE,
    pool_size: Sizes = 2,
    pool_stride: Sizes | None = None,
    pool_padding: Sizes = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """`max_pool3d(activation(conv3d(input, weight, bias)))` in one pass; what is pooled never exists in memory.

    Kept for the backward pass: operands and one byte per pooled value that says which voxel was chosen (for leaky_relu
    a second one, for silu and gelu what they were applied to), never the result, which may be changed in place.
    The gradients run over chosen voxels alone, with a pool of 2x2x2 an eighth of the dense ones. Ties and NaN choose
    as in `torch.nn.functional.max_pool3d`. Derivatives of every order, in both modes.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as for `conv3d`.
        activation: "none", "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh" (gelu with approximate="tanh").
        negative_slope: of leaky_relu, not negative.
        pool_size, pool_stride, pool_padding: one number or one per axis, as of `max_pool3d`; the stride is
            `pool_size` unless given. A window has at most 255 voxels.
        ceil_mode: whether the number of windows is rounded up.

    Returns:
        (N, C_out, D_pooled, H_pooled, W_pooled), in channels_last_3d when `input` or `weight` is.

    Raises:
        RuntimeError, TypeError, ValueError: those of `torch.nn.functional.conv3d` for its arguments.
        ValueError: activation, slope or pool are impossible, in words that say what is expected.

    Example:
        >>> import torch, pyvolconv
        >>> x, w = torch.randn(2, 3, 9, 8, 8), torch.randn(4, 3, 3, 3, 3)
        >>> y = pyvolconv.conv3d_max_pool(x, w, padding=1, activation="relu", ceil_mode=True)
        >>> y.shape
        torch.Size([2, 4, 5, 4, 4])
    """
    if has_torch_function_variadic(input, weight, bias):
        operands = (input, weight, bias)
        return handle_torch_function(
            conv3d_max_pool,
            operands,
            *(*operands, stride, padding, dilation, groups),
            activation=activation,
            negative_slope=negative_slope,
            pool_size=pool_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            ceil_mode=ceil_mode,
        )
    pool_sizes = (pool_size, pool_stride, pool_padding, ceil_mode)
    geometry = (stride, padding, dilation, groups)
    call = remembered(_calls, _pooled_call, input, weight, bias, *geometry, activation, negative_slope, *pool_sizes)
    if call is not None:
        return call(input, weight, bias)
    if is_hidden_by_vmap():
        with outside_autocast():
            return _by_the_operator(input, weight, bias, geometry, activation, negative_slope, pool_sizes)
    return _by_the_operator(input, weight, bias, geometry, activation, negative_slope, pool_sizes)


def _by_the_operator(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    activation: Activation,
    negative_slope: float,
    pool_sizes: tuple[Any, ...],
) -> Tensor:
    pool = _pool_of(*pool_sizes)
    check_activation(activation, negative_slope)
    args = None if is_recorded_for_elsewhere() else conv3d_arguments(input, weight, bias, *geometry)
    if args is None or not _fits(pool, input, weight, *args[:3]):
        # Most often torch has an error to word.
        dense = fused_ops.APPLY[activation](conv3d(input, weight, bias, *geometry), negative_slope)
        return F.max_pool3d(dense, pool.window, pool.stride, pool.padding, 1, pool.ceil_mode)
    batched = input if input.dim() == 5 else input.unsqueeze(0)
    sizes = (*args, activation, negative_slope, pool.window, pool.stride, pool.padding, pool.ceil_mode)
    y: Tensor = fused_ops.conv3d_max_pool(batched, weight, bias, *sizes)[0]
    if activation in KEEPS_PREACTIVATION:
        y = fused_ops.APPLY[activation](y, negative_slope)
    if y.device.type == "cpu" and torch.is_autocast_enabled("cpu") and y.dtype in (torch.bfloat16, torch.float16):
        # On the CPU, autocast has max_pool3d computed and returned in float32; choosing rounds nothing.
        y = y.float()
    return y if input.dim() == 5 else y.squeeze(0)


@dataclass(frozen=True)
class _PooledCall:
    """`conv3d_max_pool` of operands that fit `problem`, dense in its layout; `shortcut` says what this is for."""

    problem: ConvProblem
    sizes: tuple[Any, ...]
    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        value: Tensor
        if is_differentiated(x, weight, bias):
            value, _ = fused_derivatives.MaxPoolFunction.apply(  # type: ignore[attr-defined]
                self.run, x, weight, bias, *self.sizes
            )
        elif (backend := choose_fused_or_none(self.problem, keeps_choices=False)) is not None:
            value = run(backend.max_pool, self.problem, "forward", x, weight, bias)
        else:
            return fused_ops.pool_in_place(self.problem, self.plain(x, weight, bias))
        if self.problem.activation in KEEPS_PREACTIVATION:
            value = fused_ops.APPLY[self.problem.activation](value, 0.0)
        return value

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        """Values and code."""
        backend = choose_fused_or_none(self.problem, keeps_choices=True)
        if backend is None:
            value, code = fused_ops.conv3d_max_pool(x, weight, bias, *self.sizes)
            return value, code
        return run(backend.forward_max_pool, self.problem, "forward", x, weight, bias)


_calls: dict[Any, _PooledCall | None] = {}


def _pooled_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Activation,
    negative_slope: float,
    *pool_sizes: Any,
) -> _PooledCall | None:
    pool = _pool_of(*pool_sizes)
    check_activation(activation, negative_slope)
    plain = plain_call(input, weight, bias, stride, padding, dilation, groups)
    if plain is None or not _fits(pool, input, weight, *plain.args[:3]):
        return None
    sizes = (*plain.args, activation, negative_slope, pool.window, pool.stride, pool.padding, pool.ceil_mode)
    return _PooledCall(fused_ops.fused_problem(plain.problem, pool, activation, negative_slope), sizes, plain)


def _pool_of(size: Any, stride: Any, padding: Any, ceil_mode: Any) -> MaxPool:
    window, steps, pad = triple(size), triple(size if stride is None else stride), triple(padding)
    if window is None or steps is None or pad is None:
        raise ValueError(
            f"pool_size={size!r}, pool_stride={stride!r} and pool_padding={padding!r} must each be "
            "one int or three, (depth, height, width)"
        )
    return MaxPool(window, steps, pad, ceil_mode)


def _fits(pool: MaxPool, input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether a pool finds a window in the convolution's result; what does not is left to torch to name."""
    size = tuple(
        (voxels + padding[2 * axis] + padding[2 * axis + 1] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis, voxels in enumerate(input.shape[-3:])
    )
    return min(pool.output_size(size)) >= 1
