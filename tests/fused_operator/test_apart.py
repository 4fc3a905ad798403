"""A convolution and the pool behind it run apart where that is expected to be faster, with the same results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.backends.pooling_time import pooling_time
from pyvolconv.problem import ConvProblem

from .calls import ACTIVATIONS, POOLS, ours, theirs

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last_3d)


@pytest.fixture(params=[True, False], ids=["apart", "in one pass"])
def apart(request, monkeypatch):
    asked = []

    def answer(problem, keeps_choices, *_):
        asked.append(keeps_choices)
        return request.param

    answer.cache_clear = lambda: None
    monkeypatch.setattr(dispatch, "_is_faster_apart", answer)
    return asked


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["ncdhw", "ndhwc"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_are_torchs(apart, activation, pool, memory_format):
    x = torch.randn(2, 5, 7, 6, 9).contiguous(memory_format=memory_format)
    w, b = torch.randn(17, 5, 3, 3, 3).contiguous(memory_format=memory_format), torch.randn(17)
    expected = theirs(activation, pool, padding=1)(x.double(), w.double(), b.double()).float()
    with torch.no_grad():
        y = ours(activation, pool, padding=1)(x, w, b)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous(memory_format=memory_format)
    assert apart == [False]


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_are_torchs(apart, pool):
    operands = [torch.randn(shape) for shape in ((2, 5, 7, 6, 9), (17, 5, 3, 3, 3), (17,))]
    singles = [operand.clone().requires_grad_() for operand in operands]
    doubles = [operand.double().requires_grad_() for operand in operands]
    y = ours("relu", pool, padding=1)(*singles)
    expected = theirs("relu", pool, padding=1)(*doubles)
    grad = torch.randn(expected.shape)
    for one, other in zip(
        torch.autograd.grad(y, singles, grad), torch.autograd.grad(expected, doubles, grad.double()), strict=True
    ):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)
    assert set(apart) == {True}


def test_integers_nan_and_infinities_are_chosen_as_torch_does(apart):
    x = torch.randint(-2, 3, (1, 3, 6, 6, 6)).float()
    x[0, 0, 1, 2, 3], x[0, 1, 4, 4, 4], x[0, 2, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    w = torch.eye(3).view(3, 3, 1, 1, 1)
    with torch.no_grad():
        y = pyvolconv.conv3d_max_pool(x, w, activation="relu", pool_size=3, pool_stride=2)
        expected = F.max_pool3d(F.relu(F.conv3d(x, w)), 3, 2)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_who_is_forced_is_not_asked(apart):
    x, w = torch.randn(1, 2, 6, 6, 6), torch.randn(3, 2, 3, 3, 3)
    with torch.no_grad(), pyvolconv.use_backend("cpp.direct"):
        pyvolconv.conv3d_max_pool(x, w)
    with torch.no_grad():
        pyvolconv.conv3d_max_pool(x.double(), w.double())
    assert apart == []


def test_choices_cost_and_ncdhw_does():
    text = "n1ic64oc128-i16x56x56-k3-p1-relu-pool3x3x3s2p1"
    ncdhw, ndhwc = (ConvProblem.parse(f"cpu-float32-{layout}-{text}") for layout in ("ncdhw", "ndhwc"))
    assert pooling_time(ndhwc, keeps_choices=False) < pooling_time(ndhwc, keeps_choices=True)
    assert pooling_time(ndhwc, keeps_choices=False) < pooling_time(ncdhw, keeps_choices=False)


def test_winograd_and_a_pool_beat_one_pass_without_winograd():
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic64oc128-i16x56x56-k3-p1-relu-pool3x3x3s2p1")
    able = [backend.name for backend in dispatch.able_backends(problem, "forward")]
    assert able == [] or "cpp.winograd" not in able
    assert dispatch.choose_fused_or_none(problem, keeps_choices=False) is None
