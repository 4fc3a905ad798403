"""Quantization maps modules by their exact type: an accelerated model is reverted for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyvolconv

from .models import sample

quantization = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")


def quantized(model):
    """Post-training static quantization, in eager mode."""
    net = quantization.QuantWrapper(copy.deepcopy(model)).eval()
    net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(net)
    prepared(sample())
    return quantization.convert(prepared)


def test_a_reverted_model_is_quantized_as_before():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))
    torch.manual_seed(0)
    expected = quantized(reference)
    torch.manual_seed(0)
    model = pyvolconv.accelerate(reference)
    got = quantized(pyvolconv.revert(copy.deepcopy(model)))
    kinds = [type(module) for module in expected.modules()]
    assert torch.ao.nn.quantized.Conv3d in kinds
    assert [type(module) for module in got.modules()] == kinds
    x = sample()
    assert torch.equal(got(x), expected(x))
    assert isinstance(model[0], pyvolconv.Conv3d)
