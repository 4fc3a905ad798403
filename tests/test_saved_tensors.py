"""Hooks of saved tensors: what they return is computed with, or refused where torch refuses it; never misread."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyvolconv

from .closeness import assert_close

FUNCTIONS = {
    "conv3d": (
        lambda x, w, b: pyvolconv.conv3d(x, w, b, padding=1),
        lambda x, w, b: F.conv3d(x, w, b, padding=1),
    ),
    "conv_transpose3d": (
        lambda x, w, b: pyvolconv.conv_transpose3d(x, w.transpose(0, 1).contiguous(), b),
        lambda x, w, b: F.conv_transpose3d(x, w.transpose(0, 1).contiguous(), b),
    ),
    "conv3d_max_pool": (
        lambda x, w, b: pyvolconv.conv3d_max_pool(x, w, b, padding=1, activation="leaky_relu", pool_size=2),
        lambda x, w, b: F.max_pool3d(F.leaky_relu(F.conv3d(x, w, b, padding=1)), 2),
    ),
    "conv3d_activation": (
        lambda x, w, b: pyvolconv.conv3d_activation(x, w, b, padding=1, activation="silu"),
        lambda x, w, b: F.silu(F.conv3d(x, w, b, padding=1)),
    ),
}


def of_numbers(change):
    return lambda one: change(one) if one.is_floating_point() else one


SAME = {
    "another layout": lambda one: one.contiguous(memory_format=torch.channels_last_3d) if one.dim() == 5 else one,
    "strided": lambda one: torch.stack([one, one], -1)[..., 0],
    "copied": torch.clone,
}
REFUSED = {
    "float64": of_numbers(lambda one: one.double()),
    "float16": of_numbers(lambda one: one.half()),
    "another size": lambda one: one[..., :-1],
}


def operands():
    return torch.randn(2, 4, 6, 6, 6), torch.randn(5, 4, 3, 3, 3), torch.randn(5)


def gradients(function, tensors, hook):
    leaves = [one.clone().requires_grad_() for one in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda one: one, hook):
        y = function(*leaves)
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("hook", SAME)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_values(name, hook):
    ours, theirs = FUNCTIONS[name]
    tensors = operands()
    assert_close(gradients(ours, tensors, SAME[hook]), gradients(theirs, tensors, torch.clone))


@pytest.mark.parametrize("hook", REFUSED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_does_not_fit(name, hook):
    for function in FUNCTIONS[name]:
        with pytest.raises(RuntimeError):
            gradients(function, operands(), REFUSED[hook])


@pytest.mark.parametrize("change", [lambda b: b[:1], lambda b: b.double(), lambda b: b.half()])
def test_operators_refuse_a_bias_that_does_not_fit(change):
    x, w, b = operands()
    geometry = ([1, 1, 1], [1] * 6, [1, 1, 1], 1)
    pool = ([2, 2, 2], [2, 2, 2], [0, 0, 0], False)
    operators = torch.ops.pyvolconv
    calls = (
        lambda b: operators.conv3d(x, w, b, *geometry),
        lambda b: operators.conv3d_activation(x, w, b, None, *geometry, "relu", 0.01),
        lambda b: operators.conv3d_max_pool(x, w, b, *geometry, "relu", 0.01, *pool),
    )
    for call in calls:
        call(b)
        with pytest.raises(RuntimeError, match=r"expected a tensor of \(5,\) in torch.float32"):
            call(change(b))


@pytest.mark.parametrize("change", [lambda code: code[..., :-1], lambda code: code.to(torch.int16)])
def test_codes_of_a_pool_that_do_not_fit(change):
    def hook(one):
        return change(one) if one.dtype == torch.uint8 else one

    with pytest.raises(RuntimeError, match=r"expected a tensor of \(2, 5, 3, 3, 3\) in torch.uint8"):
        gradients(FUNCTIONS["conv3d_max_pool"][0], operands(), hook)
