"""What a model looks at may change after `accelerate`: guards, hooks, replaced modules, train and eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .models import Code, Ordinary, assert_same, assert_same_in_training, settle, small

FLAG = True


def test_forward_code_is_followed_only_while_it_would_be_the_same(passes):
    """Everything that the code looks at may change afterwards."""
    reference = settle(Ordinary()).eval()
    model = pyvolconv.accelerate(copy.deepcopy(reference))

    def check(fused):
        passes["fused"] = 0
        assert_close(model(small()), reference(small()))
        assert passes["fused"] == fused

    check(3)
    assert_close(model(small(), 3.0), reference(small(), 3.0))
    assert_close(model(small(), scale=3.0), reference(small(), scale=3.0))
    for net in (model, reference):
        net.rate = 0.7
    check(3)  # it is not read in eval mode, and read anew in training:
    assert_same_in_training(model, reference)
    for net in (model.eval(), reference.eval()):
        net.layers.append(nn.Identity())
    check(0)
    for net in (model, reference):
        del net.layers[2]
        net.pool = nn.MaxPool3d(2, 1)
    check(3)
    for net in (model, reference):
        net.pool.register_forward_hook(lambda module, args, output: output + 1)
    check(1)


def test_guards_hold_on_global_names(passes, monkeypatch):
    def forward(self, x):
        y = self.relu(self.conv(x))
        return self.pool(y) if FLAG else y

    net = type("Net", (Code,), {"forward": forward})()
    model = pyvolconv.accelerate(net)
    assert model(small()).shape[2] == 4
    assert passes["fused"] == 1
    monkeypatch.setitem(globals(), "FLAG", False)
    assert model(small()).shape[2] == 8
    assert passes["fused"] == 1


def test_hooks_registered_later_see_everything(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    seen = []
    for register in (model[1].register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(lambda module, args, output: seen.append(type(module).__name__))
        model(small())
        assert passes["fused"] == 0
        handle.remove()
    assert seen == ["ReLU", "Conv3d", "ReLU", "MaxPool3d", "Sequential"]
    model(small())
    assert passes["fused"] == 1
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    model(small()).sum().backward()
    assert seen[-1] == "backward"


def test_modules_replaced_later_are_run(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    model[1] = nn.Tanh()
    expected = F.max_pool3d(torch.tanh(F.conv3d(small(), model[0].weight, model[0].bias)), 2)
    assert_close(model(small()), expected)
    model[1] = nn.ReLU()
    model.append(nn.Flatten())
    assert model(small()).dim() == 2
    assert passes["fused"] == 1
    assert model[:2](small()).shape == (2, 4, 6, 7, 5)


def test_training_norm_is_not_folded_and_keeps_its_statistics():
    reference = settle(nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    for mode in (True, False, True):
        model.train(mode)
        reference.train(mode)
        assert_same(model, reference, small())
        assert_close(model.state_dict(), reference.state_dict())


def test_norm_refuses_one_sample_as_before():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()).eval()
    with pytest.raises(ValueError, match="expected 5D input"):
        pyvolconv.accelerate(model)(small()[0])
