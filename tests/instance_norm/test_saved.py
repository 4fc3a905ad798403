"""What is kept for backward: changed meanwhile by others, or by hooks, as torch lets them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .operands import LAYOUTS, compiled

pytestmark = [compiled, pytest.mark.usefixtures("at_any_size")]

NORMS = {"instance": lambda: nn.InstanceNorm3d(6, affine=True), "batch": lambda: nn.BatchNorm3d(6)}
BEHIND = {"none": (), "relu": (nn.ReLU(),), "leaky_relu": (nn.LeakyReLU(0.2),), "slopes": (nn.PReLU(6),)}
HOOKS = {
    "another layout": (lambda one: one.contiguous(), lambda one: one),
    "rounded": (lambda one: (one.dtype, one.bfloat16()), lambda pair: pair[1].to(pair[0])),
    "another dtype": (lambda one: one.float(), lambda one: one),
    "strided": (lambda one: torch.stack([one, one], -1), lambda one: one[..., 0]),
}


def both(kind, behind):
    theirs = nn.Sequential(NORMS[kind](), *copy.deepcopy(BEHIND[behind]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1, 1)
    return theirs, pyvolconv.accelerate(copy.deepcopy(theirs), keep_channels_last=True)


def gradients(model, x, meanwhile=lambda y: y):
    """Of the input and every parameter, for what `meanwhile` makes of the result."""
    given = x.clone().requires_grad_()
    y = meanwhile(model(given))
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), [given, *model.parameters()])


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("kind", NORMS)
def test_hooks_of_saved_tensors(kind, behind, layout, hooks):
    theirs, ours = both(kind, behind)
    x = torch.randn(3, 6, 4, 5, 6).to(memory_format=LAYOUTS[layout])
    with torch.autograd.graph.saved_tensors_hooks(*HOOKS[hooks]):
        got = gradients(ours, x)
    results = (got, gradients(theirs, x))
    if hooks == "rounded":
        # Where rounding takes a value to the other side of zero the gradient is another.
        for got, expected in zip(*results, strict=True):
            assert float((got - expected).norm()) < 0.5 * float(expected.norm())
    else:
        assert_close(*results)


@pytest.mark.parametrize(
    "change", [lambda one: one[..., :-1].clone(), lambda one: one.flatten()[:-2], lambda one: one[:0]]
)
@pytest.mark.parametrize("which", [(5,), (1,), (2,)], ids=["inputs", "parameters", "statistics"])
@pytest.mark.parametrize("kind", NORMS)
def test_tensors_that_do_not_fit_are_never_read_past_their_end(kind, which, change):
    """Those of the statistics are not needed for a formula in torch's functions, which the others do not fit."""
    _, ours = both(kind, "relu")
    given = torch.randn(3, 6, 4, 5, 6, requires_grad=True)

    def hook(one):
        return change(one) if one.dim() in which else one

    with torch.autograd.graph.saved_tensors_hooks(lambda one: one, hook):
        y = ours(given)
    if which == (2,):
        y.sum().backward()
        assert_close(given.grad, torch.autograd.grad(ours(given).sum(), given)[0])
        return
    with pytest.raises((RuntimeError, IndexError)):
        y.sum().backward()


@pytest.mark.parametrize("kind", NORMS)
def test_a_bias_in_front_of_prelu_may_not_change(kind):
    _, ours = both(kind, "slopes")
    y = ours(torch.randn(3, 6, 4, 5, 6))
    with torch.no_grad():
        ours[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("behind", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("kind", NORMS)
def test_a_bias_may_change_meanwhile(kind, behind):
    models = both(kind, behind)
    x = torch.randn(3, 6, 4, 5, 6)

    def step(model):
        def change(y):
            with torch.no_grad():
                model[0].bias.add_(1)
            return y

        return gradients(model, x, change)

    assert_close(*map(step, models))


def test_a_weight_or_an_input_may_not():
    theirs, ours = both("batch", "relu")
    for model in (ours, theirs):
        for change in (lambda model, x: model[0].weight, lambda model, x: x):
            x = torch.randn(3, 6, 4, 5, 6)
            given = (2 * x).requires_grad_()
            y = model(given)
            with torch.no_grad():
                change(model, given).add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("behind", ["relu", "leaky_relu", "slopes"])
@pytest.mark.parametrize("kind", NORMS)
def test_a_result_may_change(kind, behind):
    """Nothing of it is kept: gradients are those of the result as it was."""
    _, ours = both(kind, behind)
    x = torch.randn(3, 6, 4, 5, 6)
    results = [gradients(ours, x, change) for change in (lambda y: y.mul(2), lambda y: y.mul_(2))]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
