"""Convolutions and InstanceNorm3d that run in channels_last_3d inside (`stretches`)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyvolconv
from pyvolconv import stretches
from pyvolconv.backends import cpp_instance_norm

from ..closeness import assert_close
from ..instance_norm.operands import LAYOUTS

pytestmark = pytest.mark.skipif(not cpp_instance_norm.is_available(), reason="no compiled module")


def block(first=3):
    return nn.Sequential(
        nn.Conv3d(first, 8, 3, padding=1),
        nn.InstanceNorm3d(8, affine=True),
        nn.LeakyReLU(inplace=True),
        nn.Sequential(nn.Conv3d(8, 6, 3, stride=2, padding=1, bias=False), nn.InstanceNorm3d(6), nn.PReLU()),
        nn.Conv3d(6, 5, 1),
    )


def order(tensor):
    """The strides; an axis of one element has none."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.fixture
def ran(monkeypatch):
    """The numbers of modules in the stretches that ran, however small they are."""
    seen = []
    run_stretch = stretches.run_stretch

    def counted(modules, x):
        seen.append(len(modules))
        return run_stretch(modules, x)

    monkeypatch.setattr("pyvolconv.chains.run_stretch", counted)
    monkeypatch.setattr(stretches, "FEWEST_VALUES", 0)
    return seen


@pytest.mark.parametrize("forced", ["cpp.amx", "cpp.winograd", "cpp.direct", "aten", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_torch(forced, layout, channels, training, ran):
    """Values, gradients, and all strides: nobody sees what is inside."""
    if forced == "cpp.winograd" and training:
        pytest.skip("no gradient of this stride and of a 1x1x1 kernel")
    theirs = block(channels).train(training)
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, channels, 9, 10, 11).to(memory_format=LAYOUTS[layout])
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            if model is ours and forced == "cpp.amx" and not pyvolconv._C.has_matrix_unit():
                pytest.skip("no matrix unit")
            if model is ours and forced and forced != "cpp.winograd":
                with pyvolconv.use_backend(forced):
                    y = model(leaf)
            else:
                y = model(leaf)
        results.append([y])
        if training:
            y.backward(torch.ones_like(y).cumsum(2))
            results[-1] += [leaf.grad, *(parameter.grad for parameter in model.parameters())]
    assert ran == [6]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert order(got) == order(expected)


def test_not_where_somebody_sees_it(ran):
    ours = pyvolconv.accelerate(block())
    x = torch.randn(1, 3, 8, 8, 8)
    expected = ours(x)
    seen = []
    handle = ours[1].register_forward_hook(lambda module, inputs, y: seen.append(inputs[0].is_contiguous()))
    assert_close(ours(x), expected)
    handle.remove()
    assert seen == [True]
    assert ran == [6, 3]  # the second one begins behind the hook
    ran.clear()
    for other in (x[0], x.double()):
        model = copy.deepcopy(ours).to(other.dtype)
        assert model(other).dtype == other.dtype
    with torch.autocast("cpu"):
        ours(x)
    assert not ran


def test_format_is_kept_where_that_was_asked_for(ran):
    ours = pyvolconv.accelerate(block()[:4], keep_channels_last=True)
    x = torch.randn(1, 3, 8, 8, 8)
    assert ours(x).is_contiguous()
    assert ran == [6]
    y = ours(x.to(memory_format=torch.channels_last_3d))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, ours(x), rtol=1e-4, atol=1e-4)
    assert ran == [6, 6]


def test_small_ones_are_left_alone(ran, monkeypatch):
    monkeypatch.setattr(stretches, "FEWEST_VALUES", 1 << 18)
    pyvolconv.accelerate(block())(torch.randn(1, 3, 8, 8, 8))
    assert not ran


def test_second_derivatives(ran):
    theirs = nn.Sequential(nn.Conv3d(2, 3, 3), nn.InstanceNorm3d(3), nn.Softplus()).double().float()
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    # No smooth x: the norm would divide by what little is left of it.
    given = torch.randn(1, 2, 5, 5, 5)
    results = []
    for model in (theirs, ours):
        x = given.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


class Wrapper(nn.Module):
    """As networks have them: the layers by name and in a Sequential."""

    def __init__(self, before, after):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(before, after, 3, padding=1), nn.InstanceNorm3d(after, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.LeakyReLU(inplace=True))

    def forward(self, x):
        return self.all_modules(x)


class Doubling(Wrapper):
    def forward(self, x):
        return 2 * self.all_modules(x)


def test_goes_on_through_wrappers(ran):
    theirs = nn.Sequential(Wrapper(3, 4), Doubling(4, 5), nn.Sequential(Wrapper(5, 4), Wrapper(4, 3)))
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = torch.randn(1, 3, 8, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert ran == [3, 3, 6]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    calls = []
    ours[2][1].register_forward_hook(lambda *seen: calls.append(seen[0]))
    ran.clear()
    ours(x)
    assert ran == [3, 3, 3, 3]
    assert calls == [ours[2][1]]
    ours[2][0].all_modules = nn.Sequential(*ours[2][0].all_modules)
    ours[2][0].all_modules[0].register_forward_hook(lambda *seen: calls.append(seen[0]))
    ours(x)
    assert calls[1] is ours[2][0].conv
    reverted = pyvolconv.revert(ours)
    assert type(reverted[0]) is Wrapper
    torch.testing.assert_close(reverted(x), theirs(x), rtol=1e-3, atol=1e-4)
