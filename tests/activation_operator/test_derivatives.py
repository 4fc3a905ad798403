"""Derivatives of `conv3d_activation` of every order and in both modes, and transforms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from ..closeness import assert_close
from .calls import CASES, operands, ours, theirs


@pytest.mark.parametrize(("activation", "residual"), CASES)
def test_gradcheck(activation, residual):
    args = operands(residual=residual, size=(3, 4, 3))
    modes = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(ours(activation), args, check_batched_grad=True, fast_mode=True, **modes)
    modes = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert gradgradcheck(ours(activation), args, check_batched_grad=True, fast_mode=True, **modes)


@pytest.mark.parametrize("wanted", [which for which in itertools.product([False, True], repeat=4) if any(which)])
def test_gradients_and_tangents_of_any_subset_of_the_operands(wanted):
    args = tuple(arg.detach().requires_grad_(want) for arg, want in zip(operands(), wanted, strict=True))
    inputs = [arg for arg in args if arg.requires_grad]
    places = [place for place, want in enumerate(wanted) if want]
    for activation in ("leaky_relu", "silu"):
        results = []
        for function in (ours(activation), theirs(activation)):
            y = function(*args)

            def of_some(*some, function=function):
                several = [arg.detach() for arg in args]
                for place, value in zip(places, some, strict=True):
                    several[place] = value
                return function(*several)

            primals = tuple(tensor.detach() for tensor in inputs)
            tangent = jvp(of_some, primals, tuple(torch.ones_like(tensor) for tensor in primals))[1]
            results.append((torch.autograd.grad(y.pow(3).sum(), inputs), tangent))
        assert_close(*results)


def scalar(function):
    """Cubic, so that second derivatives are neither zero nor constant."""
    return lambda *args: (function(*args) ** 3).sum()


TRANSFORMS = {
    "grad": grad,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(jacfwd)": lambda f, arg: jacrev(jacfwd(f, arg), arg),
    "jacfwd(jacfwd)": lambda f, arg: jacfwd(jacfwd(f, arg), arg),
    "jacrev(jacrev)": lambda f, arg: jacrev(jacrev(f, arg), arg),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("arg", range(4))
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_function_transforms(activation, arg, transform):
    x, w, b, _ = (tensor.detach() for tensor in operands(size=(2, 3, 2)))
    args = (x[:1], w[:2, :, :, :1, :].contiguous(), b[:2])
    args = (*args, torch.randn_like(theirs()(*args)))
    apply = TRANSFORMS[transform]
    assert_close(apply(scalar(ours(activation)), arg)(*args), apply(scalar(theirs(activation)), arg)(*args))


IN_DIMS = [dims for dims in itertools.product([None, 0, -1], repeat=4) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_vmap_over_every_combination_of_operands(activation):
    several = [[tensor.detach() for tensor in operands(size=(2, 3, 3))] for _ in range(3)]
    for in_dims in IN_DIMS:
        mapped = [
            tensors[0] if dim is None else torch.stack(tensors, dim)
            for tensors, dim in zip(zip(*several, strict=True), in_dims, strict=True)
        ]
        assert_close(vmap(ours(activation), in_dims)(*mapped), vmap(theirs(activation), in_dims)(*mapped))


def test_vmap_of_gradients():
    several = [[tensor.detach() for tensor in operands(size=(2, 3, 3))] for _ in range(3)]
    mapped = [torch.stack(tensors) for tensors in zip(*several, strict=True)]
    for activation in ("leaky_relu", "gelu"):
        for arg in range(4):
            got, expected = (vmap(grad(scalar(f(activation)), arg))(*mapped) for f in (ours, theirs))
            assert_close(got, expected)
