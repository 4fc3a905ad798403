"""Accelerated models taken back, copied and pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .models import SEQUENTIALS, Ordinary, rows, settle, small


@pytest.mark.parametrize("build", [Ordinary, lambda: SEQUENTIALS["nested"][0]()])
def test_revert_restores(build, passes):
    model = build()
    keys, before = list(model.state_dict()), {path: type(module) for path, module in model.named_modules()}
    attributes = {path: list(module.__dict__) for path, module in model.named_modules()}
    pyvolconv.accelerate(pyvolconv.accelerate(model))
    assert list(model.state_dict()) == keys
    assert {path: list(module.__dict__) for path, module in model.named_modules()} == attributes
    assert pyvolconv.revert(model) is model
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(became.endswith("of torch") for became, _ in rows(model).values())
    model.eval()(small())
    assert passes == {"fused": 0, "plain": 0}


@pytest.mark.parametrize("build", [Ordinary, lambda: SEQUENTIALS["nested"][0]()])
def test_copies_stay_fused_and_pickles_are_the_original(build, passes):
    model = pyvolconv.accelerate(settle(build()).eval())
    expected = model(small())
    fused = passes["fused"]
    copied = copy.deepcopy(model)
    assert_close(copied(small()), expected)
    assert passes["fused"] == 2 * fused > 0
    assert next(copied.parameters()) is not next(model.parameters())
    if build is not Ordinary:
        return
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored) is Ordinary
    assert type(restored.conv1) is nn.Conv3d
    assert_close(restored(small()), expected)
