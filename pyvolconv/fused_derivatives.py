"""Derivatives of the fused operators, of every order, in reverse and in forward mode.

With the chosen voxels held fixed, as max-pooling does almost everywhere, let S be the linear map that selects them from
a dense tensor (`fused_voxels.select`). Then z = S(conv3d(x, w) + b) is what the activation is applied to, and

    dx = conv3d_max_pool_grad_input(dz, code, w)  = conv3d_grad_input(S^T(dz), w)
    dw = conv3d_max_pool_grad_weight(dz, code, x) = conv3d_grad_weight(S^T(dz), x)

are its two transposes. As without a pool, <dz, S(conv3d(x, w))> = <dx, x> = <dw, w>, so the derivatives of dx and dw
are again one another and S(conv3d(., .)), of which every factor is differentiable: all orders follow by recursion.

The activation's own derivative comes from the value that the operator returned, for relu and leaky_relu from its sign.

Inside of `use_dense_backward()` the right-hand sides are computed as they stand: S^T(dz) is made once, in full, and
both gradients visit all of its voxels. The difference in time is what the sparse gradients save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from .derivatives import autograd_kernel, grad_bias, inside_node
from .dispatch import forced_backend, use_backend_of_forward
from .fused_ops import (
    conv3d_max_pool,
    conv3d_max_pool_grad_input,
    conv3d_max_pool_grad_weight,
    dense_size,
    split_sizes,
)
from .fused_voxels import scatter, select
from .ops import conv3d, conv3d_grad_input, conv3d_grad_weight, library

_dense_backward: ContextVar[bool] = ContextVar("pyvolconv_dense_backward", default=False)


@contextmanager
def use_dense_backward() -> Iterator[None]:
    """Give the forward passes of this thread inside the block a dense backward, wherever that runs later.

    For measuring: it computes the same gradients, in more time and memory than the sparse ones.
    """
    token = _dense_backward.set(True)
    try:
        yield
    finally:
        _dense_backward.reset(token)


def _conv3d_at_chosen(x: Tensor, weight: Tensor, code: Tensor, sizes: Sequence[Any]) -> Tensor:
    geometry, pool = split_sizes(sizes)
    return select(conv3d(x, weight, None, *geometry), code, pool)


def _through_activation(grad: Tensor, value: Tensor, activation: str, slope: float) -> Tensor:
    """`grad` times the activation's derivative; silu's and gelu's is taken where they are applied."""
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, value, 0)
    if activation == "leaky_relu":
        grad = torch.ops.aten.leaky_relu_backward(grad, value, slope, True)
    return grad


_Gradients = tuple[Tensor | None, Tensor | None]


def _sparse_gradients(
    grad: Tensor, code: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[Any], needs_x: bool, needs_weight: bool
) -> _Gradients:
    return (
        conv3d_max_pool_grad_input(grad, code, weight, x.shape[2:], *sizes) if needs_x else None,
        conv3d_max_pool_grad_weight(grad, code, x, weight.shape[2:], *sizes) if needs_weight else None,
    )


def _dense_gradients(
    grad: Tensor, code: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[Any], needs_x: bool, needs_weight: bool
) -> _Gradients:
    if not (needs_x or needs_weight):
        return None, None
    geometry, pool = split_sizes(sizes)
    dense = scatter(grad, code, dense_size(x, weight, geometry), pool)
    return (
        conv3d_grad_input(dense, weight, x.shape[2:], *geometry) if needs_x else None,
        conv3d_grad_weight(dense, x, weight.shape[2:], *geometry) if needs_weight else None,
    )


class _MaxPoolFunction(_SingleLevelFunction):
    """Autograd node of conv3d_max_pool, of one level of torch.func transforms."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Any:
        value, code = inside_node(conv3d_max_pool, keyset, (x, weight, bias, *sizes))
        ctx.save_for_backward(x, weight, value, code)
        ctx.save_for_forward(x, weight, value, code)
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes
        ctx.forced_backend = forced_backend()
        ctx.dense_backward = _dense_backward.get()
        return value, code

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        nothing = (None,) * len(ctx.sizes)
        if grad is None:
            return (None, None, None, None, *nothing)
        x, weight, value, code = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        sizes = (*ctx.sizes[:4], *ctx.sizes[6:])
        with use_backend_of_forward(ctx.forced_backend):
            grad = _through_activation(grad, value, *ctx.sizes[4:6])
            gradients = _dense_gradients if ctx.dense_backward else _sparse_gradients
            return (
                None,
                *gradients(grad, code, x, weight, sizes, needs_x, needs_weight),
                grad_bias(grad) if needs_bias else None,
                *nothing,
            )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, x_tangent, weight_tangent, bias_tangent, *_ = tangents
        x, weight, value, code = ctx.saved_tensors
        terms = []
        if x_tangent is not None:
            terms.append(_conv3d_at_chosen(x_tangent, weight, code, ctx.sizes))
        if weight_tangent is not None:
            terms.append(_conv3d_at_chosen(x, weight_tangent, code, ctx.sizes))
        if bias_tangent is not None:
            terms.append(bias_tangent.view(-1, 1, 1, 1).expand(value.shape))
        return _through_activation(sum(terms[1:], start=terms[0]), value, *ctx.sizes[4:6]), None


@dataclass(frozen=True)
class _Sparse:
    """A sparse gradient, bilinear in `grad` and `other`, and its two transposes of (grad, code, other, cotangent)."""

    operator: Any
    transpose_grad: Callable[[Tensor, Tensor, Tensor, Sequence[Any]], Tensor]
    transpose_other: Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[Any]], Tensor]


_RULES = (
    _Sparse(
        conv3d_max_pool_grad_input,
        lambda code, weight, cotangent, sizes: _conv3d_at_chosen(cotangent, weight, code, sizes),
        lambda grad, code, weight, cotangent, sizes: conv3d_max_pool_grad_weight(
            grad, code, cotangent, weight.shape[2:], *sizes
        ),
    ),
    _Sparse(
        conv3d_max_pool_grad_weight,
        lambda code, x, cotangent, sizes: _conv3d_at_chosen(x, cotangent, code, sizes),
        lambda grad, code, x, cotangent, sizes: conv3d_max_pool_grad_input(grad, code, cotangent, x.shape[2:], *sizes),
    ),
)


class _SparseFunction(_SingleLevelFunction):
    """Autograd node of the two sparse gradients, called as operator(grad, code, other, size, *sizes)."""

    @staticmethod
    def forward(
        ctx: Any, rule: _Sparse, keyset: Any, grad: Tensor, code: Tensor, other: Tensor, size: Any, *sizes: Any
    ) -> Tensor:
        ctx.save_for_backward(grad, code, other)
        ctx.save_for_forward(grad, code, other)
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.size, ctx.sizes = rule, size, sizes
        ctx.forced_backend = forced_backend()
        result: Tensor = inside_node(rule.operator, keyset, (grad, code, other, size, *sizes))
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        nothing = (None,) * (1 + len(ctx.sizes))
        if cotangent is None:
            return (None, None, None, None, None, *nothing)
        grad, code, other = ctx.saved_tensors
        _, _, needs_grad, _, needs_other, *_ = ctx.needs_input_grad
        with use_backend_of_forward(ctx.forced_backend):
            return (
                None,
                None,
                ctx.rule.transpose_grad(code, other, cotangent, ctx.sizes) if needs_grad else None,
                None,
                ctx.rule.transpose_other(grad, code, other, cotangent, ctx.sizes) if needs_other else None,
                *nothing,
            )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, _, grad_tangent, _, other_tangent, *_ = tangents
        grad, code, other = ctx.saved_tensors
        terms = []
        if grad_tangent is not None:
            terms.append(ctx.rule.operator(grad_tangent, code, other, ctx.size, *ctx.sizes))
        if other_tangent is not None:
            terms.append(ctx.rule.operator(grad, code, other_tangent, ctx.size, *ctx.sizes))
        return sum(terms[1:], start=terms[0])


library.impl(
    conv3d_max_pool,
    autograd_kernel(conv3d_max_pool, _MaxPoolFunction.apply),  # type: ignore[attr-defined]
    "Autograd",
    with_keyset=True,
)
for _rule in _RULES:
    _node = partial(_SparseFunction.apply, _rule)  # type: ignore[attr-defined]
    library.impl(_rule.operator, autograd_kernel(_rule.operator, _node), "Autograd", with_keyset=True)
