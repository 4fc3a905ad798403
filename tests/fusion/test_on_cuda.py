"""Chains without a pool on CUDA are one operator, which applies the activation; here on tensors without memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import pyvolconv
from pyvolconv import chains

from ..closeness import assert_close


class Called(TorchDispatchMode):
    """The operators that ran in the block, in order."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.25),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


def chain(activation):
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), copy.deepcopy(activation)).eval()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_is_one_operator_that_knows_the_activation(name):
    model = pyvolconv.accelerate(chain(ACTIVATIONS[name]))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        x = torch.empty(2, 2, 4, 4, 4, device="cuda")
        with torch.no_grad(), Called() as called:
            y = functional_call(model, state, (x,))
        assert y.device.type == "cuda"
    ran = [(operator, args[-2:]) for operator, args in called.calls if operator.startswith("conv3d")]
    slope = 0.25 if name == "leaky_relu" else 0.01
    assert ran == [("conv3d_activation", (name, slope))]
    assert not {"relu", "leaky_relu", "silu", "gelu", "relu_", "leaky_relu_"} & {
        operator for operator, _ in called.calls
    }


def test_is_reported_as_one_pass():
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(2, 4, 3), nn.LeakyReLU()))
    assert str(pyvolconv.fusion_report(model).rows[0].became) == "Conv3d + LeakyReLU, in place without gradients"
    with FakeTensorMode():
        model[0]._parameters["weight"] = torch.empty(4, 2, 3, 3, 3, device="cuda")
    assert str(pyvolconv.fusion_report(model).rows[0].became) == "Conv3d + LeakyReLU in one pass"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_computes_what_the_modules_do(name, monkeypatch):
    """The same way taken by tensors with memory, forward and backward."""
    theirs = chain(ACTIVATIONS[name]).double()
    nn.init.uniform_(theirs[1].running_mean, -1, 1)
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    calls = []

    def conv3d_activation(*args, **kwargs):
        calls.append(kwargs["activation"])
        return pyvolconv.conv3d_activation(*args, **kwargs)

    monkeypatch.setattr(chains, "conv3d_activation", conv3d_activation)
    monkeypatch.setattr(chains, "has_activation_in_the_pass", lambda x: True)
    y, expected = ours(x), theirs(x)
    assert calls == [name]
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    gradients = [
        torch.autograd.grad(result, (x, *model.parameters()), cotangent)
        for result, model in ((y, ours), (expected, theirs))
    ]
    assert_close(*gradients)
    x = x.detach()
    with torch.no_grad():
        assert_close(ours(x), theirs(x))
    assert calls == [name, name]
