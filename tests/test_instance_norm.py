"""`InstanceNorm3d` is torch's: same results to within rounding, same errors, and what it leaves alone to the bit."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv


def pair(channels=6, **options):
    """torch's module and ours with the same parameters, none of them trivial."""
    theirs, ours = nn.InstanceNorm3d(channels, **options), pyvolconv.InstanceNorm3d(channels, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def calls(monkeypatch):
    """The numbers of groups that F.group_norm was called with."""
    seen = []
    group_norm = F.group_norm

    def counted(input, groups, *arguments):
        seen.append(groups)
        return group_norm(input, groups, *arguments)

    monkeypatch.setattr(F, "group_norm", counted)
    return seen


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 4, 7), (1, 6, 33, 31, 30), (6, 3, 4, 5), (3, 6, 1, 2, 3)])
@torch.no_grad()
def test_values(affine, training, shape, calls):
    """No further from float64 than twice torch's own distance, and a few units in the last place."""
    theirs, ours = (module.train(training) for module in pair(affine=affine))
    x = 3 + 2 * torch.randn(shape)
    peer, result = theirs(x), ours(x)
    exact = theirs.double()(x.double())
    assert calls == [6]
    limit = 2 * float((peer - exact).abs().max()) + 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((result - exact).abs().max()) <= limit
    assert result.stride() == peer.stride()


@pytest.mark.parametrize("mean", [0, 10, 1000])
def test_gradients_are_those_of_torch_to_the_bit(mean, calls):
    """Group normalization would be wrong in the third digit at a mean of ten."""
    theirs, ours = pair(affine=True)
    x, grad = mean + torch.randn(2, 6, 16, 16, 16), 1 + torch.randn(2, 6, 16, 16, 16)
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, module.weight.grad, module.bias.grad])
    assert calls == []
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@torch.no_grad()
def test_large_mean_costs_its_own_rounding_and_no_more():
    """Computed as mean of squares less square of mean, the variance alone would be wrong by a tenth."""
    theirs, ours = pair()
    x = 1000 + torch.randn(2, 6, 20, 20, 20)
    assert float((ours(x) - theirs(x.double())).abs().max()) <= 2 * 1000 * torch.finfo(torch.float32).eps


def untouched():
    channels_last = torch.randn(2, 6, 4, 4, 4).to(memory_format=torch.channels_last_3d)
    yield "running statistics", {"track_running_stats": True}, torch.randn(2, 6, 4, 4, 4)
    yield "channels last", {"affine": True}, channels_last
    yield "half", {}, torch.randn(2, 6, 4, 4, 4).half()


@pytest.mark.parametrize(("options", "x"), [pytest.param(*case, id=name) for name, *case in untouched()])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_the_rest_is_torch_to_the_bit(options, x, training, calls):
    theirs, ours = (module.train(training) for module in pair(**options))
    expected, y = theirs(x), ours(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    for buffer, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(buffer, other)
    assert calls == []


@torch.no_grad()
def test_autocast_decides_as_for_torch(calls):
    theirs, ours = pair(affine=True)
    x = torch.randn(1, 6, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    assert calls == []


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (2, 6, 1, 1, 1)), ({"affine": True}, (2, 5, 3, 3, 3)), ({}, (2, 6, 3, 3)[:3]), ({}, (0, 6, 3, 3, 3))],
)
@torch.no_grad()
def test_errors_are_those_of_torch(options, shape):
    def outcome(module):
        try:
            return module(torch.randn(shape)).shape
        except Exception as error:
            return type(error), str(error)

    theirs, ours = pair(**options)
    assert outcome(ours) == outcome(theirs)


@torch.no_grad()
def test_any_number_of_channels_where_nothing_depends_on_it():
    theirs, ours = pair()
    x = torch.randn(2, 4, 3, 3, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.testing.assert_close(ours(x), theirs(x))
    assert len(seen) == 2


@torch.no_grad()
def test_accelerate_swaps_and_reverts(calls):
    model = nn.Sequential(nn.Conv3d(1, 6, 3), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU())
    x = torch.randn(1, 1, 6, 6, 6)
    expected = model(x)
    pyvolconv.accelerate(model)
    assert isinstance(model[1], pyvolconv.InstanceNorm3d)
    torch.testing.assert_close(model(x), expected)
    assert calls == [6]
    assert type(pickle.loads(pickle.dumps(model))[1]) is nn.InstanceNorm3d
    assert pyvolconv.accelerate(model)[1] is model[1]
    assert type(pyvolconv.revert(model)[1]) is nn.InstanceNorm3d
