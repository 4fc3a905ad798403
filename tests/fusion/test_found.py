"""Chains that `accelerate` finds and runs as one pass, and what it says of each."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import pyvolconv

from .models import CHAIN, SEQUENTIALS, Ordinary, assert_same, assert_same_in_training, rows, settle, small

WITH_NORM = "Conv3d + BatchNorm3d + ReLU + MaxPool3d in one pass"


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_found_in_sequential(name):
    build, became = SEQUENTIALS[name]
    reference = build()
    if "affine" not in name:
        settle(reference)
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert next(iter(rows(model).values())) == (became, "")
    assert_same(model, reference, small())
    assert list(model.state_dict()) == list(reference.state_dict())
    assert str(model) == str(reference)
    assert len(model) == len(reference)


def test_a_chain_is_one_call(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 2, 1)))
    model(small())
    assert passes == {"fused": 1, "plain": 1}


def test_found_in_forward_code(passes):
    reference = settle(Ordinary())
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert rows(model) == {
        "conv1": ("Conv3d alone", f"BatchNorm3d is in training mode; otherwise {WITH_NORM}"),
        "norm1": ("BatchNorm3d + ReLU in one pass", ""),
        "conv2": (CHAIN, ""),
        "block.0": ("Conv3d + LeakyReLU + MaxPool3d in one pass", ""),
        "layers.0": ("Conv3d + ReLU, in place", ""),
        "layers.1": ("Conv3d + ReLU, in place", ""),
        "skip": ("Conv3d alone", "Ordinary.forward uses its result 2 times"),
    }
    assert_same(model.eval(), reference.eval(), small())
    assert passes["fused"] == 3
    assert rows(model)["conv1"] == (WITH_NORM, "")
    assert_same_in_training(model, reference)


def test_without_fusing(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)), fuse=False)
    assert type(model) is nn.Sequential
    assert rows(model) == {"0": ("Conv3d alone", "accelerated without fusing")}
    model(small())
    assert passes == {"fused": 0, "plain": 1}


def test_example_input_is_checked_with_the_chains():
    model = Ordinary().eval()
    assert pyvolconv.accelerate(model, small()) is model
    assert rows(model)["conv2"] == (CHAIN, "")


def test_report_says_what_runs_between_hooks_around_every_module(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert rows(model) == {"0": ("Conv3d alone", f"hooks around every module; otherwise {CHAIN}")}
        model(small())
    assert passes == {"fused": 0, "plain": 1}
    assert rows(model) == {"0": (CHAIN, "")}


def test_report_is_a_table():
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2)))
    assert str(pyvolconv.fusion_report(model)).splitlines() == [
        "module  became                   why not more",
        "------  -----------------------  -------------------------------------",
        "0       Conv3d + ReLU, in place",
        "2       ConvTranspose3d alone    transposed convolutions are not fused",
    ]


def test_report_of_a_model_without_convolutions():
    assert str(pyvolconv.fusion_report(pyvolconv.accelerate(nn.Linear(2, 2)))) == "The model has no 3-D convolution."


def test_report_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"fusion_report\(\) takes a torch.nn.Module, got int"):
        pyvolconv.fusion_report(3)
