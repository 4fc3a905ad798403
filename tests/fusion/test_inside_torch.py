"""Fused models under the rest of torch: compile, fx, autocast, vmap, training, and the cost profiler."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv
from pyvolconv.cost.counting import count_model

from ..closeness import assert_close
from .models import SEQUENTIALS, Ordinary, assert_same, settle, small


@pytest.mark.parametrize("build", [Ordinary, lambda: SEQUENTIALS["norm"][0]()])
def test_compiles_in_one_graph(build):
    reference = settle(build()).eval()
    model = torch.compile(pyvolconv.accelerate(copy.deepcopy(reference)), fullgraph=True, backend="aot_eager")
    assert_same(model, reference, small())


def test_traced_by_torch_fx_as_before():
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2))
    traced = torch.fx.symbolic_trace(pyvolconv.accelerate(copy.deepcopy(reference)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]


def test_under_autocast_vmap_and_forced_backends():
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    x = small()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), reference(x), rtol=0.05, atol=0.05)
    assert_close(torch.func.vmap(model)(x[:, None]), torch.func.vmap(reference)(x[:, None]))
    for name in ("numba", "im2col", "aten", "cpp"):
        with pyvolconv.use_backend(name):
            assert_same(model, reference, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_training_gives_the_same_losses(layout):
    """Twenty steps of Adam; rounding alone may tell them apart."""
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Conv3d(4, 8, 3, padding=1),
        nn.LeakyReLU(),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2 * 3, 2),
    )
    reference = reference.double().to(memory_format=layout)
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    x, labels = torch.randn(16, 1, 7, 8, 9).double(), torch.randint(2, (16,))
    losses = []
    for net in (model, reference):
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        history = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.contiguous(memory_format=layout)), labels)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    assert losses[0][-1] < losses[0][0] / 2
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)


def test_the_profiler_sees_the_pass_that_runs(passes):
    """Counted at its convolution, with the gradients' sparse work; nothing else is left of the chain."""
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    costs = {
        (cost.layer, cost.kind): cost for cost in count_model(model, torch.zeros(2, 3, 8, 9, 7, requires_grad=True))
    }
    assert passes == {"fused": 1, "plain": 0}
    assert set(costs) == {("0", "conv")}
    conv = costs["0", "conv"]
    voxels, chosen, taps = 2 * 4 * 6 * 7 * 5, 2 * 4 * 3 * 3 * 2, 3 * 27
    assert conv.passes["forward"].flops == 2 * voxels * taps + voxels
    assert conv.passes["grad_weight"].flops == 2 * chosen * taps + chosen
    model[1].register_forward_hook(lambda module, args, output: None)
    count_model(model, torch.zeros(2, 3, 8, 9, 7))
    assert passes == {"fused": 1, "plain": 1}
