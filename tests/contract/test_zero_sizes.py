"""Tensors and layers with an axis of size 0: torch's shapes, zero gradients, or torch's errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import pyvolconv

from .layers import FORMATS, assert_same_outcome, outcome, pair

SHAPES = [
    (0, 4, 5, 6, 7),
    (0, 4, 2, 2, 2),
    (2, 0, 5, 6, 7),
    (0, 0, 5, 6, 7),
    (2, 4, 0, 6, 7),
    (2, 4, 5, 6, 0),
    (0, 4, 0, 6, 7),
    (4, 0, 6, 7),
    (0, 5, 6, 7),
]
OPTIONS = [{}, {"padding": 1}, {"padding": 3, "stride": 2}, {"groups": 2}, {"padding": 1, "bias": False}]


def gradients(result, leaves):
    if isinstance(result, Exception):
        return []
    return [outcome(lambda leaf=leaf: torch.autograd.grad(result.sum(), leaf, retain_graph=True)[0]) for leaf in leaves]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_empty_inputs(kind, name, options):
    for shape, memory_format in itertools.product(SHAPES, FORMATS):
        ours, theirs = pair(kind, name, 4, 6, 3, **options)
        for layer in (ours, theirs):
            layer.to(memory_format=memory_format)
        x = torch.randn(shape, requires_grad=True)
        got, expected = outcome(ours, x), outcome(theirs, x)
        assert_same_outcome(got, expected)
        mine, other = gradients(got, [x, *ours.parameters()]), gradients(expected, [x, *theirs.parameters()])
        for gradient, wanted in zip(mine, other, strict=True):
            assert_same_outcome(gradient, wanted)


def test_an_empty_batch_gives_zero_gradients(kind, name):
    ours, _ = pair(kind, name, 4, 6, 3)
    ours(torch.randn(0, 4, 5, 6, 7)).sum().backward()
    for parameter in ours.parameters():
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()


@pytest.mark.parametrize("channels", [(0, 5), (5, 0), (0, 0)])
def test_layers_without_channels(kind, name, channels):
    ours, theirs = pair(kind, name, *channels, 3)
    for shape in ((2, channels[0], 5, 6, 7), (0, channels[0], 5, 6, 7), (2, 4, 5, 6, 7)):
        x = torch.randn(shape, requires_grad=True)
        got, expected = outcome(ours, x), outcome(theirs, x)
        assert_same_outcome(got, expected)
        for gradient, wanted in zip(gradients(got, [x]), gradients(expected, [x]), strict=True):
            assert_same_outcome(gradient, wanted)


@pytest.mark.parametrize("shape", [(6, 0, 3, 3, 3), (0, 4, 3, 3, 3), (6, 4, 0, 3, 3), (6, 4, 3, 3, 0), (0, 0, 0, 0, 0)])
@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_empty_weights(name, shape):
    for x in (torch.randn(2, 4, 5, 6, 7), torch.randn(2, 6, 5, 6, 7), torch.randn(2, shape[1], 5, 6, 7)):
        w = torch.randn(shape)
        assert_same_outcome(outcome(getattr(pyvolconv, name), x, w), outcome(getattr(F, name), x, w))
