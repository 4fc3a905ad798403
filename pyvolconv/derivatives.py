"""Derivatives of the three operators, of every order, in reverse and in forward mode.

    y  = conv3d(x, w)                x  -> y
    dx = conv3d_grad_input(dy, w)    dy -> x
    dw = conv3d_grad_weight(dy, x)   dy -> w

Each is linear in both operands, and with <., .> the sum of products

    <dy, conv3d(x, w)> = <conv3d_grad_input(dy, w), x> = <conv3d_grad_weight(dy, x), w>,

so each partial derivative of one, applied to a cotangent, is one of the three again; a tangent goes through
the operator itself. Because the formulas call the operators, their derivatives follow by recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from .autocast import outside_autocast
from .dispatch import forced_backend, use_backend_of_forward
from .ops import conv3d, conv3d_grad_input, conv3d_grad_weight, grad_bias, kernel_of, library
from .ordinary import is_ordinary


@dataclass(frozen=True)
class _Bilinear:
    """An operator and its two transposes, as functions of (first, second, cotangent, geometry)."""

    operator: Any
    grad_first: Callable[[Tensor, Tensor, Tensor, Sequence[Any]], Tensor]
    grad_second: Callable[[Tensor, Tensor, Tensor, Sequence[Any]], Tensor]


def _once(operator: Any, first: Tensor, second: Tensor, *sizes: Any) -> Tensor:
    """What the operator returns; without the dispatcher where nobody differentiates it further or steps in."""
    short = not torch.is_grad_enabled() and is_ordinary(first, second)
    result: Tensor = (kernel_of(operator) if short else operator)(first, second, *sizes)
    return result


def stored_as(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a weight, with the weight's strides where both lie in memory in the same order.

    An axis of one may have any stride. DistributedDataParallel compares strides as they stand, and warns.
    """
    if grad.stride() == weight.stride() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return grad
    if any(n != 1 and a != b for n, a, b in zip(grad.shape, grad.stride(), weight.stride(), strict=True)):
        return grad
    return grad.as_strided(grad.shape, weight.stride())


CONV3D = _Bilinear(
    conv3d,
    lambda x, weight, grad, geometry: _once(conv3d_grad_input, grad, weight, x.shape[2:], *geometry),
    lambda x, weight, grad, geometry: stored_as(
        weight, _once(conv3d_grad_weight, grad, x, weight.shape[2:], *geometry)
    ),
)
CONV3D_GRAD_INPUT = _Bilinear(
    conv3d_grad_input,
    lambda grad_output, weight, grad, geometry: _once(conv3d, grad, weight, None, *geometry),
    lambda grad_output, weight, grad, geometry: stored_as(
        weight, _once(conv3d_grad_weight, grad_output, grad, weight.shape[2:], *geometry)
    ),
)
_RULES = (
    CONV3D,
    CONV3D_GRAD_INPUT,
    _Bilinear(
        conv3d_grad_weight,
        lambda grad_output, x, grad, geometry: conv3d(x, grad, None, *geometry),
        lambda grad_output, x, grad, geometry: conv3d_grad_input(grad_output, grad, x.shape[2:], *geometry),
    ),
)


# The dispatcher brings a call here once per level of torch.func transforms, with the levels above it taken
# off, so the node belongs to that one level; autograd.Function.apply would start at the outermost again.
class LevelFunction(_SingleLevelFunction):
    """An autograd node of one level of torch.func transforms, which compiled autograd can take too."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class BilinearFunction(LevelFunction):
    """Autograd node of an operator called as operator(first, second, third, *geometry).

    The third argument is the bias of conv3d, in which the operator is affine, and a size for the others. `below` is
    what `inside_node` takes.
    """

    @staticmethod
    def forward(
        ctx: Any, rule: _Bilinear, below: Any, first: Tensor, second: Tensor, third: Any, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.geometry = rule, geometry
        ctx.size = None if rule.operator is conv3d else third
        ctx.forced_backend = forced_backend()
        result: Tensor = inside_node(rule.operator, below, (first, second, third, *geometry))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 9
        first, second = ctx.saved_tensors
        _, _, needs_first, needs_second, needs_bias, *_ = ctx.needs_input_grad
        needs_first, needs_second = asked_for(ctx, needs_first, needs_second)
        # The operators multiply complex numbers as they are; only cotangents meet conjugates (PyTorch's
        # convention for complex autograd). A real tensor is its own conjugate.
        first, second = first.conj(), second.conj()
        with as_in_forward(ctx):
            return (
                None,
                None,
                ctx.rule.grad_first(first, second, grad, ctx.geometry) if needs_first else None,
                ctx.rule.grad_second(first, second, grad, ctx.geometry) if needs_second else None,
                grad_bias(grad) if needs_bias else None,
                *(None,) * 4,
            )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, _, first_tangent, second_tangent, bias_tangent, *_ = tangents
        first, second = ctx.saved_tensors
        terms = []
        if first_tangent is not None:
            terms.append(ctx.rule.operator(first_tangent, second, ctx.size, *ctx.geometry))
        if second_tangent is not None:
            terms.append(ctx.rule.operator(first, second_tangent, ctx.size, *ctx.geometry))
        if bias_tangent is not None:
            if not terms:
                terms.append(torch.zeros_like(ctx.rule.operator(first, second, ctx.size, *ctx.geometry)))
            terms.append(bias_tangent.view(-1, 1, 1, 1))
        return sum(terms[1:], start=terms[0])


def asked_for(ctx: Any, needs_first: bool, needs_second: bool, second: int = 1) -> tuple[bool, bool]:
    """Which gradients the backward pass that runs now is to compute.

    All that are required, as a rule; but `autograd.grad(y, x)` and `backward(inputs=x)` ask for fewer, and like torch's
    own node of a convolution ours computes no others.

    Args:
        ctx: of a node, in its backward.
        needs_first, needs_second: whether the first tensor argument and the one at `second` require a gradient.
        second: counted from 0, among the tensor arguments.
    """
    # A node of which nobody asked anything would not run, so there is a choice between several alone.
    if not needs_first or not needs_second or torch.compiler.is_compiling():
        return needs_first, needs_second
    edges = ctx.next_functions
    return _will_run(edges[0][0]), _will_run(edges[second][0])


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it answers for a leaf whose gradient `autograd.grad` returns
        return True


def as_in_forward(ctx: Any) -> AbstractContextManager[None]:
    """A block for a backward pass: with the backend and the dtype of its forward call, wherever it runs."""
    usual = ctx.forced_backend is None and (torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled())
    return nullcontext() if usual else _as_in_forward(ctx)


@contextmanager
def _as_in_forward(ctx: Any) -> Iterator[None]:
    with use_backend_of_forward(ctx.forced_backend), outside_autocast():
        yield


def inside_node(operator: Any, below: Any, args: tuple[Any, ...]) -> Any:
    """What the operator returns one dispatch key below the node of this level.

    Args:
        operator: the torch operator.
        below: the key set with which the dispatcher came to the node; or, in an ordinary call that did not go through
            the dispatcher, the function that computes the operator.
        args: of either.
    """
    if callable(below):
        return below(*args)
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(operator, below, args)
    # The node switches gradients off for its own level only: outer levels differentiate the call too.
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(operator, below, args)


def _below_autograd(operator: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def autograd_kernel(operator: Any, node: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's kernel at the Autograd key: `node(keyset, *args)` where something is differentiated."""

    def kernel(keyset: Any, *args: Any) -> Any:
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not differentiable and torch.autograd.forward_ad._current_level < 0:
            return _below_autograd(operator, keyset, args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return node(keyset, *args)
        return node(keyset, *args)

    return kernel


for _rule in _RULES:
    _node = partial(BilinearFunction.apply, _rule)  # type: ignore[attr-defined]
    library.impl(_rule.operator, autograd_kernel(_rule.operator, _node), "Autograd", with_keyset=True)
