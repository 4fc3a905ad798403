"""Chains of `InstanceNorm3d` and an activation in models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .operands import chain, compiled, models

pytestmark = compiled


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "one_slope", "slopes"])
@pytest.mark.parametrize("training", [True, False])
def test_chains_are_found_and_agree(activation, training, calls):
    theirs, ours = (model.train(training) for model in chain(activation))
    x = torch.randn(2, 6, 5, 6, 7)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(torch.ones_like(y).cumsum(2))
        results.append([y, leaf.grad, *(parameter.grad for parameter in model.parameters())])
    assert len(calls) == 1
    assert y.grad_fn.name() == "InstanceNormFunctionBackward"
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        assert got.stride() == expected.stride()
    name = type(theirs[-1]).__name__
    assert [row.became for row in pyvolconv.fusion_report(ours).rows] == [
        f"InstanceNorm3d + Dropout + {name} in one pass"
    ]


def test_the_report_says_why_not():
    def reason(*layers):
        rows = pyvolconv.fusion_report(pyvolconv.accelerate(nn.Sequential(*layers))).rows
        return next(row.why_not for row in rows if row.became == "InstanceNorm3d alone")

    assert reason(nn.InstanceNorm3d(2), nn.GELU()) == "GELU follows, which does not run in its pass"
    assert reason(nn.InstanceNorm3d(2), nn.Tanh()) == "Tanh follows, which does not run in its pass"
    assert (
        reason(nn.InstanceNorm3d(2, track_running_stats=True), nn.ReLU()) == "InstanceNorm3d keeps running statistics"
    )
    assert reason(nn.InstanceNorm3d(2)) == "nothing follows"
    dropping = reason(nn.InstanceNorm3d(2), nn.Dropout(0.5), nn.ReLU())
    assert dropping == "Dropout is in training mode; otherwise InstanceNorm3d + Dropout + ReLU in one pass"
    convolution = pyvolconv.fusion_report(nn.Sequential(pyvolconv.Conv3d(1, 2, 3), pyvolconv.InstanceNorm3d(2))).rows[0]
    assert convolution.why_not == "InstanceNorm3d follows, which reads all of its input before it writes"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv3d(2, 2, 3, padding=1), nn.InstanceNorm3d(2, affine=True), nn.PReLU()
        self.again = nn.InstanceNorm3d(2)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return F.leaky_relu(self.again(y), 0.1) + x


def test_chains_in_forward_code(calls):
    theirs = Block()
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = torch.randn(1, 2, 6, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert [call.activation for call in calls] == ["none", "leaky_relu"]
    became = [row.became for row in pyvolconv.fusion_report(ours).rows[1:]]
    assert became == ["InstanceNorm3d + PReLU in one pass", "InstanceNorm3d + LeakyReLU in one pass"]
    ours.act.register_forward_hook(lambda *seen: None)
    calls.clear()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_are_called(place):
    _, ours = chain("relu")
    seen = []
    ours[place].register_forward_hook(lambda module, args, result: seen.append(result))
    x = torch.randn(1, 6, 4, 4, 4)
    y = ours(x)
    assert len(seen) == 1
    assert place != 2 or seen[0] is y
    assert pyvolconv.fusion_report(ours).rows[0].became == "InstanceNorm3d alone"


def test_dropout_that_drops_is_called(calls):
    _, ours = models(nn.InstanceNorm3d(6), nn.Dropout(1.0), nn.ReLU())
    x = torch.randn(1, 6, 4, 4, 4)
    assert not ours.train()(x).any()
    assert ours.eval()(x).any()
    assert [call.activation for call in calls] == ["none", "relu"]


class TheirNorm(nn.InstanceNorm3d):
    def forward(self, input):
        return super().forward(input) + 1


def test_subclasses_keep_what_they_do(calls):
    theirs, ours = models(TheirNorm(6), nn.ReLU())
    x = torch.randn(1, 6, 4, 4, 4)
    assert_close(ours(x), theirs(x))
    assert [call.activation for call in calls] == ["none"]


def test_accelerate_reverts_and_pickles(calls):
    model = nn.Sequential(nn.Conv3d(1, 6, 3), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU(inplace=True))
    x = torch.randn(1, 1, 6, 6, 6).to(memory_format=torch.channels_last_3d)
    expected = model(x)
    pyvolconv.accelerate(model)
    norm = model[1]
    assert isinstance(norm, pyvolconv.InstanceNorm3d)
    assert_close(model(x), expected)
    assert not norm.keeps_channels_last
    assert type(pickle.loads(pickle.dumps(model))[1]) is nn.InstanceNorm3d
    assert isinstance(copy.deepcopy(model)[1], pyvolconv.InstanceNorm3d)
    calls.clear()
    assert pyvolconv.accelerate(model, keep_channels_last=True)[1] is norm
    assert norm.keeps_channels_last
    assert_close(model(x), expected)
    assert len(calls) == 1
    assert not pyvolconv.accelerate(model)[1].keeps_channels_last
    pyvolconv.revert(model)
    assert type(norm) is nn.InstanceNorm3d
    assert type(model) is nn.Sequential
