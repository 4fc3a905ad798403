"""`accelerate(model, example)` in which a pass fails, when it runs or when it is timed, leaves the model as it was."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import pyvolconv
from pyvolconv import autotune, dispatch
from pyvolconv.errors import BackendError

from .planted import MODELS, broken_layer, built, example, snapshot


@pytest.fixture
def short_tuning(monkeypatch):
    monkeypatch.setattr(autotune, "MOST_ROUNDS", 3)
    monkeypatch.setattr(autotune, "FEWEST_ROUNDS", 2)


def everything(model):
    return snapshot(model) | {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "listeners": list(dispatch._listeners),
        "forced": dispatch.forced_backend(),
    }


def check_unchanged(model, before):
    for what, value in everything(model).items():
        assert value == before[what], what


def prepare(model, how):
    if how == "accelerated before":
        pyvolconv.accelerate(model)
    if how == "parametrized":
        weight_norm(broken_layer(model))
    if how == "other parts accelerated before":
        pyvolconv.accelerate(model[0])
    return model


STATES = ("new", "accelerated before", "other parts accelerated before", "parametrized")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", STATES)
def test_a_failing_run_of_the_example(how, name, pass_, planted):
    model = prepare(built(name), how)
    x = example()
    before = everything(model)
    # `accelerate` runs what was accelerated before once without gradients, before it swaps.
    planted.break_(pass_, spared=int(pass_ == "forward" and how == "accelerated before"))
    with pytest.raises(BackendError, match=f"^{pass_} of .*'planted' failed"):
        pyvolconv.accelerate(model, x)
    assert planted.spared < 0
    check_unchanged(model, before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("short_tuning")
def test_failing_while_it_is_timed(name, pass_, planted):
    """The example ran well, and so did the first rounds; then a candidate fails."""
    model = built(name)
    x = example()
    before = everything(model)
    planted.break_(pass_, spared=2)
    with pytest.raises(BackendError, match=f"^{pass_} of .*'planted' failed"):
        pyvolconv.accelerate(model, x)
    assert planted.spared < 0
    check_unchanged(model, before)
    planted.mend()
    pyvolconv.accelerate(model, x)
    assert isinstance(broken_layer(model), pyvolconv.Conv3d)


@pytest.mark.usefixtures("short_tuning")
def test_an_interrupted_tuning(planted):
    model = built("pooled")
    x = example()
    before = everything(model)
    planted.break_("forward", KeyboardInterrupt(), spared=2)
    with pytest.raises(KeyboardInterrupt):
        pyvolconv.accelerate(model, x)
    check_unchanged(model, before)


def test_a_module_that_cannot_be_swapped(monkeypatch):
    """The first convolution is swapped, and then looking for chains fails."""

    def fail(model):
        assert isinstance(model[0], pyvolconv.Conv3d)
        raise ValueError("no chains")

    model = built("pooled")
    before = everything(model)
    monkeypatch.setattr(sys.modules["pyvolconv.accelerate"], "find", fail)
    with pytest.raises(ValueError, match="no chains"):
        pyvolconv.accelerate(model)
    check_unchanged(model, before)


def test_without_gradients_nothing_but_the_forward_pass_can_fail(planted):
    model, x = built("plain").requires_grad_(False), example()
    planted.break_("grad_weight")
    assert pyvolconv.accelerate(model, x, tune=False) is model
    assert isinstance(broken_layer(model), nn.Conv3d)
    assert torch.is_grad_enabled()
