"""Derivatives of the fused operators, of every order, in reverse and in forward mode.

With the chosen voxels held fixed, as max-pooling does almost everywhere, let S be the linear map that selects them from
a dense tensor, and gives zero where none was chosen (`fused_voxels.select`). Then z = S(conv3d(x, w) + b) is what the
activation is applied to, and

    dx     = conv3d_max_pool_grad_input(dz, code, w)  = conv3d_grad_input(S^T(dz), w)
    dw, db = conv3d_max_pool_grad_weight(dz, code, x) = conv3d_grad_weight(S^T(dz), x), sum of S^T(dz)

are its transposes. As without a pool, <dz, S(conv3d(x, w) + b)> = <dx, x> + <db, b> = <dw, w> + <db, b>, so the
derivatives of these are again one another and S(conv3d(., .) + .), of which every factor is differentiable: all orders
follow by recursion.

A relu is part of S, which is why it has no derivative of its own here; that of leaky_relu comes from the sign of the
value that the operator returned, kept as a mask.

Inside of `use_dense_backward()` the right-hand sides are computed as they stand: S^T(dz) is made once, in full, and
both gradients visit all of its voxels. The difference in time is what the sparse gradients save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .derivatives import LevelFunction, as_in_forward, asked_for, autograd_kernel, inside_node, stored_as
from .dispatch import forced_backend
from .fused_ops import (
    conv3d_max_pool,
    conv3d_max_pool_grad_input,
    conv3d_max_pool_grad_weight,
    dense_size,
    split_sizes,
)
from .fused_voxels import passed, scatter, select
from .ops import conv3d, conv3d_grad_input, conv3d_grad_weight, grad_bias, library

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


def _conv3d_at_chosen(x: Tensor, weight: Tensor, bias: Tensor | None, code: Tensor, sizes: Sequence[Any]) -> Tensor:
    geometry, pool = split_sizes(sizes)
    return select(conv3d(x, weight, bias, *geometry), code, pool)


def _bias_at_chosen(bias: Tensor, code: Tensor) -> Tensor:
    return passed(bias.view(-1, 1, 1, 1), code)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total: Tensor = sum(terms[1:], start=terms[0])
    return total


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _sparse_gradients(
    grad: Tensor, code: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[Any], needs: Sequence[bool]
) -> _Gradients:
    needs_x, needs_weight, needs_bias = needs
    of_x = conv3d_max_pool_grad_input(grad, code, weight, x.shape[2:], *sizes) if needs_x else None
    if not needs_weight:
        return of_x, None, grad_bias(passed(grad, code)) if needs_bias else None
    of_weight, of_bias = conv3d_max_pool_grad_weight(grad, code, x, weight.shape[2:], needs_bias, *sizes)
    return of_x, stored_as(weight, of_weight), of_bias if needs_bias else None


def _dense_gradients(
    grad: Tensor, code: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[Any], needs: Sequence[bool]
) -> _Gradients:
    needs_x, needs_weight, needs_bias = needs
    geometry, pool = split_sizes(sizes)
    size = dense_size(x.shape[2:], weight.shape[2:], geometry)
    dense = scatter(grad, code, size, pool) if needs_x or needs_weight else None
    return (
        None if dense is None or not needs_x else conv3d_grad_input(dense, weight, x.shape[2:], *geometry),
        None
        if dense is None or not needs_weight
        else stored_as(weight, conv3d_grad_weight(dense, x, weight.shape[2:], *geometry)),
        grad_bias(passed(grad, code)) if needs_bias else None,
    )


class MaxPoolFunction(LevelFunction):
    """Autograd node of conv3d_max_pool, of one level of torch.func transforms."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Any:
        value, code = inside_node(conv3d_max_pool, keyset, (x, weight, bias, *sizes))
        activation, ctx.slope = sizes[4:6]
        # A mask, not the value: torch's max-pool keeps no result either, so whoever gets it may change it in place.
        positive = value > 0 if activation == "leaky_relu" else None
        ctx.save_for_backward(x, weight, positive, code)
        ctx.save_for_forward(x, weight, positive, code)
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        ctx.sizes = (*sizes[:4], *sizes[6:])
        ctx.forced_backend = forced_backend()
        ctx.dense_backward = _dense_backward.get()
        return value, code

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        rest = (None,) * (2 + len(ctx.sizes))
        if grad is None:
            return (None, None, None, None, *rest)
        x, weight, positive, code = ctx.saved_tensors
        gradients = _dense_gradients if ctx.dense_backward else _sparse_gradients
        _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = (*asked_for(ctx, needs_x, needs_weight), needs_bias)
        with as_in_forward(ctx):
            if positive is not None:
                grad = torch.where(positive, grad, grad * ctx.slope)
            return (None, *gradients(grad, code, x, weight, ctx.sizes, needs), *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, x_tangent, weight_tangent, bias_tangent, *_ = tangents
        x, weight, positive, code = ctx.saved_tensors
        terms = []
        if x_tangent is not None:
            terms.append(_conv3d_at_chosen(x_tangent, weight, None, code, ctx.sizes))
        if weight_tangent is not None:
            terms.append(_conv3d_at_chosen(x, weight_tangent, None, code, ctx.sizes))
        if bias_tangent is not None:
            terms.append(_bias_at_chosen(bias_tangent, code))
        tangent = _sum(terms)
        if positive is not None:
            tangent = torch.where(positive, tangent, tangent * ctx.slope)
        return tangent, None


class _GradInputFunction(LevelFunction):
    """Autograd node of conv3d_max_pool_grad_input."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, grad: Tensor, code: Tensor, weight: Tensor, size: Any, *sizes: Any) -> Tensor:
        ctx.save_for_backward(grad, code, weight)
        ctx.save_for_forward(grad, code, weight)
        ctx.set_materialize_grads(False)
        ctx.size, ctx.sizes = size, sizes
        ctx.forced_backend = forced_backend()
        result: Tensor = inside_node(conv3d_max_pool_grad_input, keyset, (grad, code, weight, size, *sizes))
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        rest = (None,) * (1 + len(ctx.sizes))
        if cotangent is None:
            return (None, None, None, None, *rest)
        grad, code, weight = ctx.saved_tensors
        _, needs_grad, _, needs_weight, *_ = ctx.needs_input_grad
        needs_grad, needs_weight = asked_for(ctx, needs_grad, needs_weight, 2)
        with as_in_forward(ctx):
            of_grad = _conv3d_at_chosen(cotangent, weight, None, code, ctx.sizes) if needs_grad else None
            of_weight = None
            if needs_weight:
                of_weight, _ = conv3d_max_pool_grad_weight(grad, code, cotangent, weight.shape[2:], False, *ctx.sizes)
            return (None, of_grad, None, of_weight, *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, grad_tangent, _, weight_tangent, *_ = tangents
        grad, code, weight = ctx.saved_tensors
        pairs = ((grad_tangent, weight), (grad, weight_tangent))
        return _sum(
            [
                conv3d_max_pool_grad_input(first, code, second, ctx.size, *ctx.sizes)
                for first, second in pairs
                if first is not None and second is not None
            ]
        )


class _GradWeightFunction(LevelFunction):
    """Autograd node of conv3d_max_pool_grad_weight."""

    @staticmethod
    def forward(
        ctx: Any, keyset: Any, grad: Tensor, code: Tensor, x: Tensor, size: Any, bias: bool, *sizes: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, code, x)
        ctx.save_for_forward(grad, code, x)
        ctx.set_materialize_grads(False)
        ctx.size, ctx.bias, ctx.sizes = size, bias, sizes
        ctx.forced_backend = forced_backend()
        of_weight, of_bias = inside_node(conv3d_max_pool_grad_weight, keyset, (grad, code, x, size, bias, *sizes))
        if not bias:
            ctx.mark_non_differentiable(of_bias)
        return of_weight, of_bias

    @staticmethod
    def backward(ctx: Any, weight_cotangent: Tensor | None, bias_cotangent: Tensor | None) -> Any:
        rest = (None,) * (2 + len(ctx.sizes))
        grad, code, x = ctx.saved_tensors
        _, needs_grad, _, needs_x, *_ = ctx.needs_input_grad
        needs_grad, needs_x = asked_for(ctx, needs_grad, needs_x, 2)
        of_grad = of_x = None
        with as_in_forward(ctx):
            if weight_cotangent is None:
                if needs_grad and bias_cotangent is not None:
                    of_grad = _bias_at_chosen(bias_cotangent, code)
                return (None, of_grad, None, None, *rest)
            if needs_grad:
                of_grad = _conv3d_at_chosen(x, weight_cotangent, bias_cotangent, code, ctx.sizes)
            if needs_x:
                of_x = conv3d_max_pool_grad_input(grad, code, weight_cotangent, x.shape[2:], *ctx.sizes)
            return (None, of_grad, None, of_x, *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, grad_tangent, _, x_tangent, *_ = tangents
        grad, code, x = ctx.saved_tensors
        of_weight, of_bias = [], None
        if grad_tangent is not None:
            term, of_bias = conv3d_max_pool_grad_weight(grad_tangent, code, x, ctx.size, ctx.bias, *ctx.sizes)
            of_weight.append(term)
        if x_tangent is not None:
            of_weight.append(conv3d_max_pool_grad_weight(grad, code, x_tangent, ctx.size, False, *ctx.sizes)[0])
        if ctx.bias and of_bias is None:
            of_bias = grad.new_zeros(grad.shape[1])
        return _sum(of_weight), of_bias if ctx.bias else None


_NODES: tuple[tuple[Any, Any], ...] = (
    (conv3d_max_pool, MaxPoolFunction),
    (conv3d_max_pool_grad_input, _GradInputFunction),
    (conv3d_max_pool_grad_weight, _GradWeightFunction),
)
for _operator, _function in _NODES:
    library.impl(_operator, autograd_kernel(_operator, _function.apply), "Autograd", with_keyset=True)
