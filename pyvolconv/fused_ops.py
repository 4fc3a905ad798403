"""Convolution, activation and max-pool as one pass: three torch operators.

    value, code = conv3d_max_pool(x, weight, bias, ...)
    dx          = conv3d_max_pool_grad_input(grad, code, weight, input_size, ...)
    dw, db      = conv3d_max_pool_grad_weight(grad, code, x, kernel_size, ...)

What is pooled never exists in memory. `code` keeps which voxel of its window each pooled value is, in one byte
(`backends/base.py` says how, and how ties and NaN resolve), and the gradients are sums over these voxels alone: with a
window of 2x2x2 an eighth of the dense ones' multiplications. Behind a relu, a window without a positive value chooses
no voxel: the activation's derivative is part of the choice. `value` is the pooled activation; for silu and gelu, whose
derivative does not follow from their value, it is what the chosen voxel held before the activation, and the caller
applies the activation to it. `grad` is the gradient of that pre-activation at the chosen voxels. db, the gradient of
the bias, is empty unless it is asked for.

Where no allowed backend has a fused pass, an operator puts it together from the plain pass and torch's pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.base import MEMORY_FORMAT, activate_in_place
from .dispatch import choose_fused_or_none, choose_or_none, run
from .epilogue import KEEPS_PREACTIVATION, NEGATIVE_SLOPE, NO_VOXEL, Activation, MaxPool, Size3
from .fused_voxels import code_of_indices, gather, passed, scatter
from .ops import conv3d, conv3d_grad_input, conv3d_grad_weight, conv3d_problem, grad_bias, layout_of, library, require
from .problem import ConvProblem, Layout

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_POOL = "int[] pool_window, int[] pool_stride, int[] pool_padding, bool ceil_mode"
library.define(
    f"conv3d_max_pool(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, "
    f"str activation, float negative_slope, {_POOL}) -> (Tensor, Tensor)"
)
library.define(
    "conv3d_max_pool_grad_input"
    f"(Tensor grad, Tensor code, Tensor weight, SymInt[] input_size, {_GEOMETRY}, {_POOL}) -> Tensor"
)
library.define(
    "conv3d_max_pool_grad_weight"
    f"(Tensor grad, Tensor code, Tensor x, SymInt[] kernel_size, bool bias, {_GEOMETRY}, {_POOL}) -> (Tensor, Tensor)"
)

conv3d_max_pool = torch.ops.pyvolconv.conv3d_max_pool.default
conv3d_max_pool_grad_input = torch.ops.pyvolconv.conv3d_max_pool_grad_input.default
conv3d_max_pool_grad_weight = torch.ops.pyvolconv.conv3d_max_pool_grad_weight.default

APPLY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, slope: F.silu(x),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
}
"""torch's function for each activation, of a tensor and the negative slope."""


def split_sizes(sizes: Sequence[Any]) -> tuple[Sequence[Any], MaxPool]:
    """(stride, padding, dilation, groups) and the pool, out of what every operator's arguments end with."""
    return sizes[:4], _pool(*(tuple(axes) for axes in sizes[-4:-1]), sizes[-1])


def dense_size(input_size: Sequence[int], kernel_size: Sequence[int], geometry: Sequence[Any]) -> Size3:
    """(D, H, W) of what is pooled; of symbolic sizes too, which a `ConvProblem` could not hold."""
    stride, padding, dilation, _ = geometry
    depth, height, width = (
        (size + padding[2 * axis] + padding[2 * axis + 1] - dilation[axis] * (kernel_size[axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis, size in enumerate(input_size)
    )
    return depth, height, width


@lru_cache(maxsize=1024)
def _pool(window: Any, stride: Any, padding: Any, ceil_mode: bool) -> MaxPool:
    return MaxPool(window, stride, padding, ceil_mode)


def fused_problem(
    plain: ConvProblem, pool: MaxPool, activation: Activation = "none", slope: float = 0.0
) -> ConvProblem:
    """`plain` with activation and pool; a gradient's problem has no activation."""
    return _with_epilogue(plain, pool, activation, slope if activation == "leaky_relu" else NEGATIVE_SLOPE)


@lru_cache(maxsize=4096)
def _with_epilogue(plain: ConvProblem, pool: MaxPool, activation: Activation, slope: float) -> ConvProblem:
    return plain.with_(activation=activation, negative_slope=slope, pool=pool)


def _run_conv3d_max_pool(x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> tuple[Tensor, Tensor]:
    geometry, pool = split_sizes(sizes)
    activation, slope = sizes[4:6]
    layout = layout_of(x, weight)
    plain = conv3d_problem(x.shape, weight.shape, geometry, x, layout, bias is not None)  # type: ignore[arg-type]
    problem = fused_problem(plain, pool, activation, slope)
    require(problem, weight, problem.weight_shape, x)
    if bias is not None:
        require(problem, bias, (problem.out_channels,), x)
    backend = choose_fused_or_none(problem, keeps_choices=True) if x.numel() else None
    if backend is not None:
        x, weight = _dense(layout, x, weight)
        bias = None if bias is None else bias.contiguous()
        return run(backend.forward_max_pool, problem, "forward", x, weight, bias)
    value, code = put_together_conv3d_max_pool(x, weight, bias, *sizes)
    value, code = _dense(layout, value, code)
    return value, code


def _run_conv3d_max_pool_grad_input(
    grad: Tensor, code: Tensor, weight: Tensor, input_size: Sequence[int], *sizes: Any
) -> Tensor:
    geometry, pool = split_sizes(sizes)
    layout = layout_of(grad, code, weight)
    shape = (grad.shape[0], weight.shape[1] * geometry[3], *input_size)
    plain = conv3d_problem(shape, weight.shape, geometry, grad, layout)  # type: ignore[arg-type]
    problem = fused_problem(plain, pool)
    _require_pooled(problem, grad, code, weight)
    backend = choose_or_none(problem, "grad_input") if grad.numel() and weight.numel() else None
    if backend is not None:
        return run(backend.grad_input_max_pool, problem, "grad_input", *_dense(layout, grad, code, weight))
    return _dense(layout, put_together_grad_input(grad, code, weight, input_size, *sizes))[0]


def _run_conv3d_max_pool_grad_weight(
    grad: Tensor, code: Tensor, x: Tensor, kernel_size: Sequence[int], bias: bool, *sizes: Any
) -> tuple[Tensor, Tensor]:
    geometry, pool = split_sizes(sizes)
    layout = layout_of(grad, code, x)
    shape = (grad.shape[1], x.shape[1] // geometry[3], *kernel_size)
    plain = conv3d_problem(x.shape, shape, geometry, grad, layout, bias)  # type: ignore[arg-type]
    problem = fused_problem(plain, pool)
    _require_pooled(problem, grad, code, x)
    backend = choose_or_none(problem, "grad_weight") if grad.numel() and x.numel() else None
    if backend is not None:
        operands = _dense(layout, grad, code, x)
        weight_part, bias_part = run(backend.grad_weight_max_pool, problem, "grad_weight", *operands)
        return weight_part, grad.new_empty(0) if bias_part is None else bias_part
    weight_part, bias_part = put_together_grad_weight(grad, code, x, kernel_size, bias, *sizes)
    return _dense(layout, weight_part)[0], bias_part


def _require_pooled(problem: ConvProblem, grad: Tensor, code: Tensor, like: Tensor) -> None:
    require(problem, grad, problem.pooled_shape, like)
    require(problem, code, problem.pooled_shape, like, torch.uint8)


def put_together_conv3d_max_pool(x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> tuple[Tensor, Tensor]:
    """What the operator returns, by the plain pass and torch's pooling; of symbolic sizes too."""
    geometry, pool = split_sizes(sizes)
    activation, slope = sizes[4:6]
    dense = conv3d(x, weight, bias, *geometry)
    value, indices = F.max_pool3d_with_indices(
        APPLY[activation](dense, slope), pool.window, pool.stride, pool.padding, ceil_mode=pool.ceil_mode
    )
    code = code_of_indices(indices, dense.shape[2:], pool)
    if activation in KEEPS_PREACTIVATION:
        value = gather(dense, indices)
    if activation == "relu":
        code = torch.where(value <= 0, NO_VOXEL, code)
    return value, code


def pool_in_place(problem: ConvProblem, dense: Tensor) -> Tensor:
    """Activation and max-pool of a convolution's result that nobody else has, by torch's pooling and without a code."""
    pool = problem.pool
    assert pool is not None
    dense = activate_in_place(dense, problem.activation, problem.negative_slope)
    value: Tensor = F.max_pool3d(dense, pool.window, pool.stride, pool.padding, 1, pool.ceil_mode)
    return value.contiguous(memory_format=MEMORY_FORMAT[problem.layout])


def put_together_grad_input(
    grad: Tensor, code: Tensor, weight: Tensor, input_size: Sequence[int], *sizes: Any
) -> Tensor:
    """As `put_together_conv3d_max_pool`, of the gradient for the input."""
    geometry, pool = split_sizes(sizes)
    grad_output = scatter(grad, code, dense_size(input_size, weight.shape[2:], geometry), pool)
    grad_input: Tensor = conv3d_grad_input(grad_output, weight, input_size, *geometry)
    return grad_input


def put_together_grad_weight(
    grad: Tensor, code: Tensor, x: Tensor, kernel_size: Sequence[int], bias: bool, *sizes: Any
) -> tuple[Tensor, Tensor]:
    """As `put_together_conv3d_max_pool`, of the gradients for weight and bias."""
    geometry, pool = split_sizes(sizes)
    grad_output = scatter(grad, code, dense_size(x.shape[2:], kernel_size, geometry), pool)
    grad_weight = conv3d_grad_weight(grad_output, x, kernel_size, *geometry)
    return grad_weight, grad_bias(passed(grad, code)) if bias else grad.new_empty(0)


def _dense(layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous(memory_format=MEMORY_FORMAT[layout]) for tensor in tensors)


def _fake_conv3d_max_pool(x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> tuple[Tensor, Tensor]:
    geometry, pool = split_sizes(sizes)
    shape = [x.shape[0], weight.shape[0], *pool.output_size(dense_size(x.shape[2:], weight.shape[2:], geometry))]
    value, code = x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)
    memory_format = MEMORY_FORMAT[layout_of(x, weight)]
    return value.to(memory_format=memory_format), code.to(memory_format=memory_format)


def _fake_conv3d_max_pool_grad_input(
    grad: Tensor, code: Tensor, weight: Tensor, input_size: Sequence[int], *sizes: Any
) -> Tensor:
    shape = (grad.shape[0], weight.shape[1] * sizes[3], *input_size)
    return grad.new_empty(shape).to(memory_format=MEMORY_FORMAT[layout_of(grad, code, weight)])


def _fake_conv3d_max_pool_grad_weight(
    grad: Tensor, code: Tensor, x: Tensor, kernel_size: Sequence[int], bias: bool, *sizes: Any
) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], x.shape[1] // sizes[3], *kernel_size)
    grad_weight = grad.new_empty(shape).to(memory_format=MEMORY_FORMAT[layout_of(grad, code, x)])
    return grad_weight, grad.new_empty(grad.shape[1] if bias else 0)


for _operator, _kernel, _fake in (
    (conv3d_max_pool, _run_conv3d_max_pool, _fake_conv3d_max_pool),
    (conv3d_max_pool_grad_input, _run_conv3d_max_pool_grad_input, _fake_conv3d_max_pool_grad_input),
    (conv3d_max_pool_grad_weight, _run_conv3d_max_pool_grad_weight, _fake_conv3d_max_pool_grad_weight),
):
    library.impl(_operator, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_operator, _fake, lib=library)
