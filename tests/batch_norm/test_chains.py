"""BatchNorm3d in training mode and the activation behind it as one pass, found in models and around them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyvolconv

from ..closeness import assert_close
from ..instance_norm.operands import LAYOUTS, compiled

pytestmark = [compiled, pytest.mark.usefixtures("at_any_size")]

ACTIVATIONS = {
    "relu": nn.ReLU,
    "in_place": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "prelu": lambda: nn.PReLU(6),
    "silu": nn.SiLU,
}


class Block(nn.Module):
    """As residual networks have it: one activation behind its norm, one behind a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(6, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6)
        self.conv2, self.bn2 = nn.Conv3d(6, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.conv = nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.Conv3d(6, 6, 3)

    def forward(self, x):
        return self.conv(self.relu(self.bn(x)))


class NormAndActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm3d(6)

    def forward(self, x):
        return F.relu(self.bn(x))


def both(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model, pyvolconv.accelerate(copy.deepcopy(model))


def assert_same_step(ours, theirs, x):
    """Results, gradients and buffers of a training step."""
    results = []
    for model in (ours, theirs):
        given = x.clone().requires_grad_()
        y = model(given)
        gradients = torch.autograd.grad((y * torch.cos(y)).sum(), [given, *model.parameters()])
        results.append((y, gradients, model.state_dict()))
    assert_close(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_a_sequence(activation, layout, calls):
    theirs, ours = both(
        nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.Dropout(0.0), ACTIVATIONS[activation]()).double()
    )
    x = torch.randn(3, 2, 6, 7, 8, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    for model in (theirs, ours):
        model.to(memory_format=LAYOUTS[layout])
    for _ in range(2):
        assert_same_step(ours, theirs, x)
    fused = activation in ("relu", "in_place", "leaky_relu", "prelu")
    assert [call.activation != "none" or fused for call in calls] == [fused, fused]
    ours.eval(), theirs.eval()
    assert_close(ours(x), theirs(x))
    assert len(calls) == 2


@pytest.mark.parametrize("make", [Block, PreActivation, NormAndActivation])
def test_in_forward_code(make, calls):
    theirs, ours = both(make().double())
    x = torch.randn(2, 6, 5, 6, 7, dtype=torch.float64)
    assert_same_step(ours, theirs, x)
    expected = ["relu", "none"] if make is Block else ["relu"]
    assert [call.activation for call in calls] == expected
    ours.eval(), theirs.eval()
    assert_close(ours(x), theirs(x))


def test_a_norm_that_stands_in_two_places(calls):
    norm = nn.BatchNorm3d(6)
    theirs, ours = both(nn.Sequential(norm, nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1), norm, nn.ReLU()).double())
    x = torch.randn(2, 6, 5, 6, 7, dtype=torch.float64)
    assert_same_step(ours, theirs, x)
    assert [call.activation for call in calls] == ["none", "none"]
    assert int(ours[0].num_batches_tracked) == 2


def test_hooks_see_what_torchs_see(calls):
    theirs, ours = both(nn.Sequential(nn.BatchNorm3d(6), nn.ReLU()))
    x, seen = torch.randn(2, 6, 5, 6, 7), []
    handles = [
        model[0].register_forward_hook(lambda module, args, y: seen.append(y.clone())) for model in (theirs, ours)
    ]
    theirs(x), ours(x)
    assert_close(seen[1], seen[0])
    assert (seen[1] < 0).any()
    assert [call.activation for call in calls] == ["none"]
    for handle in handles:
        handle.remove()
    ours(x)
    assert calls[-1].activation == "relu"


@pytest.mark.parametrize("behind", [(), (nn.ReLU(),), (nn.ReLU(), nn.Conv3d(6, 6, 1), nn.Sigmoid())])
def test_what_a_checkpoint_computes_anew_is_counted_again(behind):
    theirs, ours = both(nn.Sequential(nn.BatchNorm3d(6), *behind))
    x = torch.randn(2, 6, 5, 6, 7)
    results = []
    for model in (ours, theirs):
        given = x.clone().requires_grad_()
        y = checkpoint(model, given, use_reentrant=False)
        y.square().sum().backward()
        results.append((y, given.grad, model.state_dict()))
    assert_close(*results)


def test_in_transforms_autocast_and_compilers():
    theirs, ours = both(nn.Sequential(nn.BatchNorm3d(6, track_running_stats=False), nn.ReLU()))
    x = torch.randn(2, 3, 6, 5, 6, 7)
    assert_close(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))
    gradients = [torch.func.grad(lambda x, model=model: model(x).square().sum())(x[0]) for model in (ours, theirs)]
    assert_close(*gradients)
    tangents = [torch.func.jvp(model, (x[0],), (x[1],)) for model in (ours, theirs)]
    assert_close(*tangents)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = ours(x[0]), theirs(x[0])
    assert one.dtype == other.dtype
    assert_close(one, other)
    assert_close(torch.jit.trace(ours, x[0], check_trace=False)(x[1]), theirs(x[1]))
    assert_close(torch.jit.script(ours)(x[1]), theirs(x[1]))
    assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x[0]), theirs(x[0]))


def test_with_functional_call_of_other_buffers():
    theirs, ours = both(nn.Sequential(nn.BatchNorm3d(6), nn.ReLU()))
    x = torch.randn(2, 6, 5, 6, 7)
    states = [{name: value.clone() for name, value in theirs.state_dict().items()} for _ in range(2)]
    before = copy.deepcopy(ours.state_dict())
    results = [
        torch.func.functional_call(model, state, (x,)) for model, state in zip((ours, theirs), states, strict=True)
    ]
    assert_close(*results)
    assert_close(*states)
    assert_close(ours.state_dict(), before)


def test_models_of_equal_structure_can_be_stacked():
    models = [
        both(nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6, track_running_stats=False), nn.ReLU()))[1]
        for _ in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 2, 5, 6, 7)

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    together = torch.func.vmap(call)(parameters, buffers)
    for one, model in zip(together, models, strict=True):
        assert_close(one, model(x))


def test_sync_batch_norm_takes_its_place():
    _, ours = both(nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU()))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert converted[1].weight.shape == (6,)


def test_double_backward(calls):
    theirs, ours = both(nn.Sequential(nn.BatchNorm3d(6), nn.LeakyReLU(0.3)).double())
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(given).pow(3).sum(), given, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [given, *model.parameters()]))
    assert_close(*results)
    assert len(calls) == 1


def test_reverted_models_have_torchs_classes():
    _, ours = both(nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU()))
    assert isinstance(ours[1], pyvolconv.BatchNorm3d)
    pyvolconv.revert(ours)
    assert type(ours[1]) is nn.BatchNorm3d


REPORTS = {
    "sequence": (lambda: nn.Sequential(nn.BatchNorm3d(6), nn.ReLU()), {"0": "BatchNorm3d + ReLU in one pass"}),
    "behind a convolution": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.PReLU()),
        {"0": "Conv3d alone", "1": "BatchNorm3d + PReLU in one pass"},
    ),
    "forward code": (
        Block,
        {
            "conv1": "Conv3d alone",
            "bn1": "BatchNorm3d + ReLU in one pass",
            "conv2": "Conv3d alone",
            "bn2": "BatchNorm3d alone",
        },
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm3d(6, track_running_stats=False), nn.ReLU()),
        {"0": "BatchNorm3d + ReLU in one pass"},
    ),
    "dropout between": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.Dropout(0.2), nn.ReLU()),
        {"0": "Conv3d alone", "1": "BatchNorm3d alone"},
    ),
    "dropout between, in eval mode": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.Dropout(0.2), nn.ReLU()).eval(),
        {"0": "Conv3d + BatchNorm3d, folded"},
    ),
    "code without a convolution": (
        lambda: nn.Sequential(NormAndActivation(), nn.Conv3d(6, 2, 3)),
        {"0.bn": "BatchNorm3d + ReLU in one pass", "1": "Conv3d alone"},
    ),
    "another activation": (lambda: nn.Sequential(nn.BatchNorm3d(6), nn.SiLU()), {"0": "BatchNorm3d alone"}),
    "eval mode": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU()).eval(),
        {"0": "Conv3d + BatchNorm3d + ReLU, in place"},
    ),
    "no chain behind": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.AvgPool3d(2)),
        {"0": "Conv3d alone", "1": "BatchNorm3d alone"},
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_says_so(name):
    make, became = REPORTS[name]
    rows = pyvolconv.fusion_report(pyvolconv.accelerate(make())).rows
    assert {row.module: row.became for row in rows} == became
    assert all(row.why_not for row in rows if row.became.endswith("alone"))
    before = pyvolconv.fusion_report(make()).rows
    assert all(row.became.endswith("of torch") for row in before)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        hooked = pyvolconv.fusion_report(pyvolconv.accelerate(make())).rows
    assert all("hooks around every module" in row.why_not for row in hooked if " + " in became[row.module])
