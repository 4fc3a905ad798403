"""Derivatives of `conv3d_max_pool` of every order and in both modes, transforms, and the dense way back."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import pyvolconv
from pyvolconv.fused_derivatives import use_dense_backward

from ..closeness import assert_close
from .calls import (
    ACTIVATION_AND_POOL,
    WITH_PASSES,
    operands,
    ours,
    theirs,
)


class Called(TorchDispatchMode):
    """The names of the operators that ran in the block."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
def test_dense_backward_gives_the_same_gradients(activation, pool, layout, poisoned):
    args = operands(layout=layout)
    with use_dense_backward():
        y = ours(activation, pool)(*args)
    with Called() as forward:
        sparse_y = ours(activation, pool)(*args)
    assert "conv3d_max_pool" in forward.names
    cotangent = torch.randn_like(y)
    with Called() as dense:  # outside of the block: a gradient keeps what its forward call was told
        got = torch.autograd.grad(y, args, cotangent)
    with Called() as sparse:
        expected = torch.autograd.grad(sparse_y, args, cotangent)
    assert_close(got, expected)
    assert {"conv3d_grad_input", "conv3d_grad_weight", "scatter_add"} <= dense.names
    assert not {"conv3d_max_pool_grad_input", "conv3d_max_pool_grad_weight"} & dense.names
    assert {"conv3d_max_pool_grad_input", "conv3d_max_pool_grad_weight"} <= sparse.names


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1, 2}])
def test_dense_backward_of_some_operands(wanted):
    args = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(operands(size=(3, 4, 4)))]
    with use_dense_backward():
        assert gradcheck(ours("leaky_relu"), args)
        assert gradgradcheck(ours("leaky_relu"), args)


def test_dense_backward_inside_of_transforms():
    x, w, b = operands()

    def loss(function, w):
        return function(x, w, b).square().sum()

    expected = jacrev(jacrev(partial(loss, theirs())))(w)
    with use_dense_backward():
        assert_close(jacrev(jacrev(partial(loss, ours())))(w), expected)


@pytest.mark.parametrize("name", WITH_PASSES)
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
def test_gradcheck(name, activation, pool):
    with pyvolconv.use_backend(name):
        assert gradcheck(
            ours(activation, pool),
            operands(),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            fast_mode=True,
        )


@pytest.mark.parametrize("name", WITH_PASSES)
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
def test_gradgradcheck(name, activation, pool):
    with pyvolconv.use_backend(name):
        assert gradgradcheck(
            ours(activation, pool),
            operands(size=(3, 4, 3)),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
            fast_mode=True,
        )


@pytest.mark.parametrize("name", WITH_PASSES)
def test_gradcheck_in_full(name):
    x, w, b = (tensor.detach() for tensor in operands(size=(2, 4, 2), batch=1))
    args = tuple(tensor.requires_grad_() for tensor in (x, w[:2, :, :1, :2].contiguous(), b[:2]))
    with pyvolconv.use_backend(name):
        assert gradcheck(ours("silu"), args)
        assert gradgradcheck(ours("silu"), args)


def scalar(function):
    """Cubic, so that second derivatives are neither zero nor constant."""
    return lambda *args: (function(*args) ** 3).sum()


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(jacfwd)": lambda f, arg: jacrev(jacfwd(f, arg), arg),
    "jacfwd(jacfwd)": lambda f, arg: jacfwd(jacfwd(f, arg), arg),
    "jacrev(jacrev)": lambda f, arg: jacrev(jacrev(f, arg), arg),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("arg", [0, 1, 2])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_function_transforms(activation, arg, transform):
    x, w, b = (tensor.detach() for tensor in operands(size=(2, 3, 2), batch=1))
    args = (x, w[:2, :, :, :1, :].contiguous(), b[:2])
    apply = TRANSFORMS[transform]
    assert_close(apply(scalar(ours(activation)), arg)(*args), apply(scalar(theirs(activation)), arg)(*args))


def test_mixed_second_derivatives():
    args = tuple(tensor.detach() for tensor in operands(size=(3, 3, 3)))

    def mixed(function):
        gradients = grad(scalar(function), (0, 1, 2))
        tangents = tuple(torch.ones_like(arg) for arg in args)
        return jvp(gradients, args, tangents)[1], vjp(gradients, *args)[1](tangents)

    assert_close(mixed(ours("silu")), mixed(theirs("silu")))


IN_DIMS = [dims for dims in itertools.product([None, 0, -1], repeat=3) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_over_every_combination_of_operands(in_dims):
    mapped = []
    for several, dim in zip(zip(*[operands() for _ in range(3)], strict=True), in_dims, strict=True):
        several = [tensor.detach() for tensor in several]
        mapped.append(several[0] if dim is None else torch.stack(several, dim))
    pairs = [(ours(), theirs())]
    pairs += [(grad(scalar(ours()), arg), grad(scalar(theirs()), arg)) for arg in range(3)]
    for got, expected in pairs:
        assert_close(vmap(got, in_dims)(*mapped), vmap(expected, in_dims)(*mapped))
