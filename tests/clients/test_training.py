"""A few training steps of networks of others go the same way; what they gain is printed."""

from __future__ import annotations

import copy

import pytest
import torch

import pyvolconv
from pyvolconv.cost.timing import alternate

pytestmark = pytest.mark.clients
STEPS = 4
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}


def training(network, model, target, optimizer, dtype):
    """A function that makes one training step and returns the loss before it."""
    model = model.to(dtype).train()
    stepping = OPTIMIZERS[optimizer](model.parameters())
    inputs = [x.to(dtype) for x in network.inputs]

    def step():
        stepping.zero_grad()
        loss = (network(model, inputs) - target.to(dtype)).square().mean()
        loss.backward()
        stepping.step()
        return loss.item()

    return step


@pytest.fixture
def start(client):
    """A network and a random target of its output's shape."""
    network = client.build()
    with torch.no_grad():
        return network, torch.randn_like(network(copy.deepcopy(network.model), network.inputs))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_go_the_same_way(start, optimizer):
    """In float64 to all digits. In float32 a value on the other side of a ReLU's kink is enough to change later losses
    in the fourth digit, torch's as much as ours: there they may be a fiftieth of the way apart.
    """
    network, target = start

    def losses(accelerate, dtype):
        model = copy.deepcopy(network.model)
        step = training(network, pyvolconv.accelerate(model) if accelerate else model, target, optimizer, dtype)
        return [step() for _ in range(STEPS)]

    exact = losses(False, torch.float64)
    assert losses(True, torch.float64) == pytest.approx(exact, rel=1e-9)
    way = max(exact) - min(exact)
    assert way > 1e-3 * exact[0], "nothing was learnt, so nothing was compared"
    assert losses(True, torch.float32) == pytest.approx(exact, rel=1e-6, abs=way / 50)


def test_speed_of_a_training_step_is_printed(client, start, capsys):
    network, target = start
    models = {"torch": copy.deepcopy(network.model), "ours": pyvolconv.accelerate(copy.deepcopy(network.model))}
    steps = {who: training(network, model, target, "Adam", torch.float32) for who, model in models.items()}
    median = {who: timing.median for who, timing in alternate(steps, rounds=3, warmup=1).items()}
    with capsys.disabled():
        print(
            f"\n{client.name}, small: training step {1e3 * median['torch']:.1f} ms by torch, "
            f"{1e3 * median['ours']:.1f} ms by pyvolconv, {median['torch'] / median['ours']:.2f} times as fast"
        )
