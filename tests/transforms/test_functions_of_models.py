"""torch.func and torch.autograd.functional on accelerated models, fused chains among them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from .cases import assert_same, sample


def loss(model, parameters, x):
    return functional_call(model, parameters, (x,)).pow(3).sum()


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


TRANSFORMS = {
    "grad": lambda model: grad(partial(loss, model), (0, 1))(parameters_of(model), sample()),
    "jacrev": lambda model: jacrev(model)(sample(1, 2, 4, 4, 4)),
    "jacfwd": lambda model: jacfwd(model)(sample(1, 2, 4, 4, 4)),
    "jvp": lambda model: jvp(partial(loss, model), (parameters_of(model), sample()), (parameters_of(model), sample())),
    "vjp": lambda model: vjp(model, x := sample())[1](model(x)),
    "vmap": lambda model: vmap(model, 1, 1)(sample(3, 5, 2, 4, 4, 4)),
    "vmap in chunks": lambda model: vmap(model, chunk_size=2)(sample(5, 1, 2, 4, 4, 4)),
    "hessian": lambda model: hessian(lambda x: model(x).pow(3).sum())(sample(1, 2, 4, 4, 4)),
    "gradients of samples": lambda model: vmap(grad(partial(loss, model)), (None, 0))(
        parameters_of(model), sample(3, 1, 2, 4, 4, 4)
    ),
    "gradients of samples without a batch": lambda model: vmap(grad(partial(loss, model)), (None, 0))(
        parameters_of(model), sample()
    ),
    "gradient of mapped losses": lambda model: grad(
        lambda parameters: vmap(partial(loss, model), (None, 0))(parameters, sample(3, 1, 2, 4, 4, 4)).sum()
    )(parameters_of(model)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, pair):
    assert_same(TRANSFORMS[transform], *pair)


FUNCTIONALS = {
    "jacobian": partial(torch.autograd.functional.jacobian, vectorize=True),
    "hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).pow(3).sum(), x, vectorize=True),
    "hvp": lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).pow(3).sum(), x, x.flip(2)),
    "vhp": lambda f, x: torch.autograd.functional.vhp(lambda x: f(x).pow(3).sum(), x, x.flip(2)),
}


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_functionals(name, pair):
    assert_same(lambda model: FUNCTIONALS[name](model, sample(1, 2, 4, 4, 4)), *pair)


def test_many_cotangents_at_once(pair):
    def check(model):
        x = sample().requires_grad_()
        y = model(x)
        cotangents = torch.randn(5, *y.shape, dtype=y.dtype)
        return torch.autograd.grad(y, [x, *model.parameters()], cotangents, is_grads_batched=True)

    assert_same(check, *pair)


@pytest.mark.parametrize("mapped_input", [False, True])
def test_ensemble(mapped_input, pair):
    """Many models' parameters and buffers as one mapped module."""

    def check(model):
        members = [copy.deepcopy(model) for _ in range(3)]
        for member in members:
            for parameter in member.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        x = sample(3, 2, 2, 4, 4, 4) if mapped_input else sample()
        return vmap(lambda state, x: functional_call(model, state, (x,)), (0, 0 if mapped_input else None))(
            stack_module_state(members), x
        )

    assert_same(check, *pair)


@pytest.mark.parametrize("call", [functional_call, torch.nn.utils.stateless.functional_call])
def test_functional_call(call, pair):
    """Other values for a call: the module's own get no gradient, the given ones do."""

    def check(model):
        others = {name: (parameter.detach() * 2).requires_grad_() for name, parameter in model.named_parameters()}
        y = call(model, others, (sample(),))
        gradients = torch.autograd.grad(y.pow(2).sum(), list(others.values()))
        assert all(parameter.grad is None for parameter in model.parameters())
        return y, gradients

    assert_same(check, *pair)


def test_batch_norms_made_functional(pair):
    def check(model):
        model = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(model)).train()
        return vmap(grad(partial(loss, model)), (None, 0))(parameters_of(model), sample(3, 2, 2, 4, 4, 4))

    assert_same(check, *pair)
