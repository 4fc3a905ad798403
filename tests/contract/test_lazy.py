"""Lazy layers: torch's before, during and after the first call, and ours or accelerated ever after."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .layers import assert_same_outcome, is_ours, outcome


@pytest.fixture
def lazies(kind, name):
    """(ours, torch's), both without their number of input channels."""

    def make():
        theirs = getattr(nn, f"Lazy{name}")(6, 3, padding=1)
        if kind == "accelerated":
            return pyvolconv.accelerate(copy.deepcopy(theirs)), theirs
        return getattr(pyvolconv, f"Lazy{name}")(6, 3, padding=1), theirs

    return make


def initialized(layer, x, seed=7):
    torch.manual_seed(seed)
    return layer(x)


def test_before_the_first_call(lazies):
    ours, theirs = lazies()
    assert is_ours(ours)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.has_uninitialized_params()
    assert issubclass(ours.cls_to_become, theirs.cls_to_become)
    for wrong in (torch.randn(4, 5), torch.randn(())):
        assert_same_outcome(outcome(ours, wrong), outcome(theirs, wrong))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 7), (4, 5, 6, 7)])
def test_first_call_makes_the_layer_that_torch_makes(lazies, name, shape):
    ours, theirs = lazies()
    x = torch.randn(shape)
    assert_same_outcome(initialized(ours, x), initialized(theirs, x))
    assert is_ours(ours)
    assert isinstance(ours, getattr(nn, name))
    assert not isinstance(ours, nn.modules.lazy.LazyModuleMixin)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert torch.equal(ours.weight, theirs.weight)
    assert_same_outcome(ours(x), theirs(x))


def test_state_of_an_initialized_layer_fits(lazies):
    ours, theirs = lazies()
    x = torch.randn(1, 4, 5, 5, 5)
    expected = initialized(theirs, x)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(x), expected)
    assert repr(ours) == repr(_loaded(lazies, theirs, x))


def _loaded(lazies, theirs, x):
    other = lazies()[1]
    other.load_state_dict(theirs.state_dict())
    other(x)
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_made_before_the_first_call(lazies, duplicate, name):
    ours, theirs = lazies()
    other = duplicate(ours)
    x = torch.randn(1, 4, 5, 5, 5)
    assert_same_outcome(initialized(other, x), initialized(theirs, x))
    assert isinstance(other, getattr(nn, name))
    assert ours.has_uninitialized_params(), "a copy has parameters of its own"


def test_reverted_before_the_first_call():
    layer = pyvolconv.revert(pyvolconv.accelerate(nn.LazyConv3d(2, 3)))
    assert type(layer) is nn.LazyConv3d
    layer(torch.randn(1, 1, 3, 3, 3))
    assert type(layer) is nn.Conv3d
