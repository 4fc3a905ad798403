"""Tools that count work and parameters see in an accelerated model what they see in the model before."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyvolconv

from .models import Code, pair, sample, sequential


def dense_code():
    """`Code` without groups, of which torch counts the gradients wrong."""
    model = Code()
    model.inner = nn.Conv3d(4, 4, 3, padding=1)
    return model


def accelerated(build, train):
    reference = build().train(train)
    return reference, pyvolconv.accelerate(copy.deepcopy(reference))


def flops(model, x):
    """Of the forward pass by module, of the backward pass by operator.

    The counter hooks into every module, so chains are called module by module where it watches.
    """
    with FlopCounterMode(model, display=False) as forward:
        model(x)
    y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    by_module = {module: sum(counts.values()) for module, counts in forward.get_flop_counts().items()}
    return by_module, {str(operator): count for operator, count in backward.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("build", [sequential, dense_code])
def test_flop_counter(build, train, needs_input):
    """Chains count as what they are made of, though their gradients visit chosen voxels only."""
    reference, model = accelerated(build, train)
    counted = [flops(net, sample().requires_grad_(needs_input)) for net in (reference, model)]
    assert counted[1][0] == counted[0][0]
    expected, got = (sum(backward.values()) for _, backward in counted)
    assert got == expected > counted[0][0]["Global"] > 0
    assert counted[1][1]["pyvolconv.conv3d_max_pool_grad_weight"] > 0, "nothing was fused"


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_flop_counter_with_groups(kind):
    """The gradients take twice what the forward pass takes; torch's formula makes more of them."""
    layer = kind(4, 8, 3, groups=4)
    x = torch.randn(2, 4, 6, 7, 8, requires_grad=True)
    reference, backward_of_torch = flops(layer, x)
    ours, backward = flops(pyvolconv.accelerate(layer), x)
    assert ours["Global"] == reference["Global"]
    assert sum(backward.values()) == 2 * ours["Global"] < sum(backward_of_torch.values())


def test_fvcore():
    fvcore = pytest.importorskip("fvcore.nn", reason="pip install fvcore")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    counted = []
    for model in pair("sequential"):
        analysis = fvcore.FlopCountAnalysis(model, sample()).unsupported_ops_warnings(False)
        counted.append((analysis.by_module_and_operator(), fvcore.parameter_count(model)))
    assert counted[1] == counted[0]
    assert counted[0][0][""]["conv"] > 0


def test_torchinfo():
    torchinfo = pytest.importorskip("torchinfo", reason="pip install torchinfo")
    tables = [str(torchinfo.summary(model, input_data=sample(), verbose=0)) for model in pair("sequential")]
    assert tables[1] == tables[0]
    assert "Conv3d: 1-1" in tables[0]


def test_thop_counts_the_reverted_copy():
    """It goes by the exact type of a module, which an accelerated one has not: `revert` a copy for it."""
    thop = pytest.importorskip("thop", reason="pip install thop")
    reference, model = pair("sequential")
    expected = thop.profile(copy.deepcopy(reference), (sample(),), verbose=False)
    assert expected[0] > 0
    reverted = pyvolconv.revert(copy.deepcopy(model))
    assert thop.profile(reverted, (sample(),), verbose=False) == expected
    assert isinstance(model[0], pyvolconv.Conv3d)
    assert thop.profile(copy.deepcopy(model), (sample(),), verbose=False)[0] < expected[0]
