"""`accelerate(model, example)`: it times what the example asks for and leaves no trace in the model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import pyvolconv
from pyvolconv import autotune, dispatch, example_run, tuned

from .rigged import rigged


class Net(nn.Module):
    """Batch statistics, three random generators, and a parameter that the result does not depend on."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)
        self.rest = nn.Sequential(nn.Dropout(), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2))
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        random.random(), np.random.rand()
        self.calls = self.calls + 1
        return {"y": self.rest(self.norm(self.first(x)))}


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr(autotune, "measure_alternating", rigged(im2col=0.1, aten=1.1))


@pytest.mark.usefixtures("no_clock")
def test_accelerate_with_an_example_tunes_and_leaves_no_trace():
    model, x = Net(), torch.randn(2, 1, 6, 6, 6)
    model.first.bias.grad = torch.ones(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    before = random_states()
    assert pyvolconv.accelerate(model, x) is model
    assert random_states() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert {name: parameter.grad is None for name, parameter in model.named_parameters()} == {
        name: name != "first.bias" for name, _ in model.named_parameters()
    }
    assert torch.equal(model.first.bias.grad, torch.ones(4))
    assert versions.keys() == dict(model.named_buffers()).keys()

    with dispatch.listen() as asked:
        model(x)["y"].sum().backward()
    passes = sorted((problem.pool is not None, pass_) for problem, pass_ in asked)
    assert passes == [
        (False, "forward"),
        (False, "grad_weight"),
        (True, "forward"),
        (True, "grad_input"),
        (True, "grad_weight"),
    ]
    for problem, pass_ in asked:
        assert set(tuned.milliseconds(problem, pass_)) >= {"aten", "cpp.direct"}
        if problem.pool is None:
            assert dispatch.choose(problem, pass_).name == "im2col"


@pytest.mark.usefixtures("no_clock")
def test_inference_times_forward_passes_only():
    model, x = pyvolconv.accelerate(nn.Conv3d(2, 3, 3)), torch.randn(1, 2, 5, 5, 5)
    with torch.no_grad():
        _, asked = example_run.forward_and_backward(model, (x,))
    assert {pass_ for _, pass_ in asked} == {"forward"}


def test_without_tuning_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(autotune, "measure_alternating", lambda steps, seconds: pytest.fail("timed"))
    pyvolconv.accelerate(nn.Conv3d(2, 3, 3), torch.randn(1, 2, 5, 5, 5), tune=False)
    pyvolconv.accelerate(nn.Conv3d(2, 3, 3))


def test_a_failing_backward_undoes_the_swap():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)

        def forward(self, x):
            return Failing.apply(self.conv(x))

    model = Net()
    with pytest.raises(RuntimeError, match="no way back"):
        pyvolconv.accelerate(model, torch.randn(1, 1, 2, 2, 2))
    assert type(model.conv) is nn.Conv3d
