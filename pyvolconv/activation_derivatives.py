"""Derivatives of `conv3d_activation`, of every order, in reverse and in forward mode.

A relu keeps its result, as torch's does, and a leaky_relu a mask of its result's signs. What they scale is the gradient
of conv3d(x, weight, bias) + residual, and the rest is as without them. The derivatives of silu and gelu need what they
are applied to: where somebody differentiates them, that is what the operator computes, and the activation is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation_ops import conv3d_activation
from .derivatives import CONV3D, LevelFunction, as_in_forward, asked_for, autograd_kernel, inside_node
from .dispatch import forced_backend
from .epilogue import KEEPS_PREACTIVATION
from .fused_ops import APPLY
from .ops import conv3d, grad_bias, library


class ActivationFunction(LevelFunction):
    """Autograd node of conv3d_activation without an activation, or with one that its result tells the derivative of.

    `below` is what `inside_node` takes.
    """

    @staticmethod
    def forward(ctx: Any, below: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        y: Tensor = inside_node(conv3d_activation, below, (x, weight, *rest))
        _, _, *ctx.geometry, ctx.activation, ctx.slope = rest
        kept = y > 0 if ctx.activation == "leaky_relu" else y if ctx.activation == "relu" else None
        ctx.save_for_backward(x, weight, kept)
        ctx.save_for_forward(x, weight, kept)
        ctx.set_materialize_grads(False)
        ctx.forced_backend = forced_backend()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 11
        x, weight, kept = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        needs_x, needs_weight = asked_for(ctx, needs_x, needs_weight)
        with as_in_forward(ctx):
            grad = _through_activation(grad, kept, ctx)
            return (
                None,
                CONV3D.grad_first(x, weight, grad, ctx.geometry) if needs_x else None,
                CONV3D.grad_second(x, weight, grad, ctx.geometry) if needs_weight else None,
                grad_bias(grad) if needs_bias else None,
                grad if needs_residual else None,
                *(None,) * 6,
            )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, x_tangent, weight_tangent, bias_tangent, residual_tangent, *_ = tangents
        x, weight, kept = ctx.saved_tensors
        terms = []
        if x_tangent is not None:
            terms.append(conv3d(x_tangent, weight, None, *ctx.geometry))
        if weight_tangent is not None:
            terms.append(conv3d(x, weight_tangent, None, *ctx.geometry))
        if residual_tangent is not None:
            terms.append(residual_tangent)
        if bias_tangent is not None:
            if not terms:
                terms.append(torch.zeros_like(conv3d(x, weight, None, *ctx.geometry)))
            terms.append(bias_tangent.view(-1, 1, 1, 1))
        return _through_activation(sum(terms[1:], start=terms[0]), kept, ctx)


def _through_activation(grad: Tensor, kept: Tensor | None, ctx: Any) -> Tensor:
    """A gradient of the result as one of what the activation is applied to; a tangent the other way."""
    if kept is None:
        return grad
    if ctx.activation == "relu":
        # It looks at the sign alone, which has no derivative.
        scaled = torch.ops.aten.threshold_backward.default(grad, kept.detach(), 0)
    else:
        scaled = torch.ops.aten.leaky_relu_backward.default(grad, kept, ctx.slope, False)
    return scaled  # type: ignore[no-any-return]


def _node(keyset: Any, *args: Any) -> Any:
    *operands, activation, slope = args
    if activation in KEEPS_PREACTIVATION:
        return APPLY[activation](conv3d_activation(*operands, "none", slope), slope)
    return ActivationFunction.apply(keyset, *args)  # type: ignore[attr-defined]


library.impl(conv3d_activation, autograd_kernel(conv3d_activation, _node), "Autograd", with_keyset=True)
