"""Weights that are replaced, changed in place, computed or pruned: the next call sees it, as torch's does."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyvolconv

from .layers import assert_same_outcome, is_ours, pair


def replace(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def assign_data(layer):
    layer.weight.data = layer.weight.data * 2


def change_data(layer):
    layer.weight.data.mul_(2)


def change_through_numpy(layer):
    # No version counter sees this one.
    layer.weight.detach().numpy()[...] *= 2


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(1)


def step(layer):
    with torch.enable_grad():
        layer(torch.ones(1, 4, 4, 4, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9).step()


def from_vector(layer):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(layer.parameters()) * 2, layer.parameters())


def swap(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * 2))


def drop_bias(layer):
    layer.bias = None


def computed(layer):
    """As HyperNetworks do: the weight is no parameter any more, but a tensor with a history."""
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight


CHANGES = [replace, assign_data, change_data, change_through_numpy, change_in_place, step, from_vector, swap]
CHANGES += [drop_bias, computed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes(kind, name, change):
    ours, theirs = pair(kind, name, 4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 6, 7)
    with torch.no_grad():
        before = ours(x)
        for layer in (ours, theirs):
            change(layer)
        assert not torch.equal(ours(x), before)
        assert_same_outcome(ours(x), theirs(x))


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


def double(layer):
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


REPARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "one of the user's": double,
    "two of them": lambda layer: double(double(layer)),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned channels": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
}
REMOVALS = {
    "old weight_norm": nn.utils.remove_weight_norm,
    "old spectral_norm": nn.utils.remove_spectral_norm,
    "pruned": lambda layer: prune.remove(layer, "weight"),
    "pruned channels": lambda layer: prune.remove(layer, "weight"),
}


def remove(way, layer):
    REMOVALS.get(way, lambda layer: parametrize.remove_parametrizations(layer, "weight"))(layer)


@pytest.mark.parametrize("way", REPARAMETRIZATIONS)
def test_reparametrized(kind, name, way):
    """Training steps, evaluation and removal give torch's values all along."""
    # What a step rounds, the next ones amplify: in float64 that is still far from any fault.
    ours, theirs = pair(kind, name, 4, 6, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for layer in (ours, theirs):
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            REPARAMETRIZATIONS[way](layer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    for _ in range(2):
        results = [layer(x) for layer in (ours, theirs)]
        near(*results)
        for layer, y in zip((ours, theirs), results, strict=True):
            y.sum().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    for layer in (ours, theirs):
        layer.eval()
    near(ours(x), theirs(x))
    for layer in (ours, theirs):
        remove(way, layer)
    assert is_ours(ours)
    near(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_functional_call(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    x = torch.randn(1, 4, 5, 5, 5)
    other = {key: torch.randn_like(value).requires_grad_() for key, value in theirs.named_parameters()}
    got, expected = (torch.func.functional_call(layer, other, (x,)) for layer in (ours, theirs))
    assert_same_outcome(got, expected)
    got.sum().backward()
    assert all(value.grad is not None for value in other.values())
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert_same_outcome(ours(x), theirs(x))


def test_tied_weights(kind):
    """One parameter in two layers gets the sum of both gradients."""
    gradients = []
    for layers in zip(*(pair(kind, "Conv3d", 4, 4, 3, padding=1) for _ in range(2)), strict=True):
        first, second = layers
        torch.manual_seed(2)
        second.weight = first.weight = nn.Parameter(torch.randn(4, 4, 3, 3, 3))
        second.bias = first.bias = None
        second(first(torch.ones(1, 4, 5, 5, 5))).sum().backward()
        gradients.append(first.weight.grad / first.weight.grad.abs().max())
    assert_same_outcome(*gradients)


def test_batch_norm_folded_by_torch(kind, name):
    """`fuse_conv_bn_eval` copies the layer and writes another weight into the copy."""
    ours, theirs = (layer.eval() for layer in pair(kind, name, 4, 6, 3))
    norm = nn.BatchNorm3d(6).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    transpose = name == "ConvTranspose3d"
    fused = [nn.utils.fusion.fuse_conv_bn_eval(layer, copy.deepcopy(norm), transpose) for layer in (ours, theirs)]
    assert is_ours(fused[0])
    x = torch.randn(1, 4, 5, 5, 5)
    assert_same_outcome(*(layer(x) for layer in fused))


def test_parametrized_model_is_accelerated_and_reverted(name):
    model = nn.Sequential(parametrizations.weight_norm(getattr(nn, name)(4, 6, 3)), nn.ReLU())
    x = torch.randn(1, 4, 5, 5, 5)
    expected, before = model(x), type(model[0])
    pyvolconv.accelerate(model)
    assert is_ours(model[0])
    assert_same_outcome(model(x), expected)
    assert type(pyvolconv.revert(model)[0]) is before
    assert not is_ours(model[0])
