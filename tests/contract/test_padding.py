"""Padding modes and "same": torch's results, gradients and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .layers import FORMATS, assert_same_outcome, outcome, pair, small_integers

MODES = ("reflect", "replicate", "circular")


def check(ours, theirs, x):
    """Same outcome, and, of a result, the same gradients of input and parameters."""
    got, expected = outcome(ours, x), outcome(theirs, x)
    assert_same_outcome(got, expected)
    if isinstance(expected, Exception) or expected.is_meta:
        return
    leaves = [x] if x.requires_grad else []
    cotangent = small_integers(*expected.shape, dtype=expected.dtype)
    mine = torch.autograd.grad(got, [*leaves, *ours.parameters()], cotangent)
    other = torch.autograd.grad(expected, [*leaves, *theirs.parameters()], cotangent)
    for gradient, wanted in zip(mine, other, strict=True):
        assert_same_outcome(gradient, wanted)


@pytest.mark.parametrize("padding", [0, 1, (0, 2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes(kind, mode, padding):
    for dtype in (torch.float32, torch.float64, torch.complex64):
        ours, theirs = pair(kind, "Conv3d", 2, 3, (3, 2, 3), padding=padding, padding_mode=mode, dtype=dtype)
        x = small_integers(2, 2, 4, 5, 6, dtype=dtype)
        check(ours, theirs, x.requires_grad_())
        check(ours, theirs, x[0].detach())
        check(ours, theirs, x.detach().to("meta"))
        for layer in (ours, theirs):
            layer.to(memory_format=torch.channels_last_3d)
        check(ours, theirs, x.detach().to(memory_format=torch.channels_last_3d).requires_grad_())


@pytest.mark.parametrize("shape", [(1, 2, 5, 5, 5), (2, 5, 5, 5), (1, 2, 1, 1, 1), (0, 2, 5, 5, 5), (1, 2, 0, 5, 5)])
@pytest.mark.parametrize("padding", [1, 4, 6], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes_refuse_what_torch_refuses(kind, mode, padding, shape):
    """More padding than there are voxels, no batch, nothing at all."""
    ours, theirs = pair(kind, "Conv3d", 2, 3, 3, padding=padding, padding_mode=mode)
    check(ours, theirs, small_integers(*shape))
    check(ours, theirs, small_integers(*shape, dtype=torch.float64))


def test_modes_that_were_set_later(kind, name):
    for mode in (*MODES, "zeros", "nonsense", None):
        ours, theirs = pair(kind, name, 2, 3, 3, padding=1)
        for layer in (ours, theirs):
            layer.padding_mode = mode
        assert_same_outcome(outcome(ours, torch.ones(1, 2, 4, 4, 4)), outcome(theirs, torch.ones(1, 2, 4, 4, 4)))


@pytest.mark.parametrize("dilation", [1, 2, (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, (2, 3, 4), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_same(kind, kernel_size, dilation, mode):
    """An even kernel pads one voxel more at the end of an axis than at its beginning."""
    options = {"padding": "same", "dilation": dilation, "padding_mode": mode}
    ours, theirs = pair(kind, "Conv3d", 2, 3, kernel_size, **options)
    for memory_format in FORMATS:
        x = small_integers(2, 2, 12, 13, 14).to(memory_format=memory_format).requires_grad_()
        check(ours, theirs, x)
        assert ours(x).shape[2:] == x.shape[2:]
    check(ours, theirs, small_integers(2, 12, 13, 14))


def test_same_of_an_even_kernel_is_this_padding():
    """The convention itself, without torch's word for it."""
    x, w = torch.randn(1, 2, 4, 5, 6), torch.randn(3, 2, 2, 4, 3)
    assert_close(pyvolconv.conv3d(x, w, padding="same"), F.conv3d(F.pad(x, (1, 1, 1, 2, 0, 1)), w))


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": (1, 1, 2)}, {"kernel_size": 9}, {"dilation": 9}])
def test_same_with_strides_or_few_voxels(kind, options):
    options = {"kernel_size": 3, "padding": "same", **options}
    expected = outcome(nn.Conv3d, 2, 3, **options)
    if isinstance(expected, Exception):
        assert_same_outcome(outcome(pyvolconv.Conv3d, 2, 3, **options), expected)
        options["padding"] = 0
    ours, theirs = pair(kind, "Conv3d", 2, 3, **options)
    for layer in (ours, theirs):
        layer.padding = "same"
    check(ours, theirs, small_integers(1, 2, 4, 4, 4))


PAIRS = [((2, 0), (1, 1), (1, 1)), ((0, 0), (3, 1), (0, 2)), [[0, 1], (2, 0), [1, 1]], ((0, 0), (0, 0), (0, 0))]


def padded_by_torch(x, w, b, padding, **options):
    return F.conv3d(F.pad(x, [side for pair in reversed(padding) for side in pair]), w, b, **options)


@pytest.mark.parametrize("padding", PAIRS, ids=str)
def test_pairs_of_begin_and_end(padding):
    """Beyond torch: zeros at the beginning and at the end of an axis, as of causal convolutions."""
    b = torch.randn(3).double().requires_grad_()
    for memory_format in FORMATS:
        x, w = torch.randn(2, 2, 4, 5, 6).double(), torch.randn(3, 2, 3, 2, 3).double()
        leaves = [x.to(memory_format=memory_format).requires_grad_(), w.requires_grad_(), b]
        for options in ({}, {"stride": (2, 1, 2), "dilation": (1, 2, 1)}):
            y, expected = (
                pyvolconv.conv3d(*leaves, padding=padding, **options),
                padded_by_torch(*leaves, padding, **options),
            )
            assert_close(y, expected)
            cotangent = torch.randn_like(y)
            for got, wanted in zip(*(torch.autograd.grad(z, leaves, cotangent) for z in (y, expected)), strict=True):
                assert_close(got, wanted)
    x, w, b = (leaf.detach() for leaf in leaves)
    assert_close(pyvolconv.conv3d(x[0], w, b, padding=padding), padded_by_torch(x, w, b, padding)[0])
    pooled = pyvolconv.conv3d_max_pool(x, w, b, padding=padding)
    assert_close(pooled, F.max_pool3d(padded_by_torch(x, w, b, padding), 2))
    traced = torch.jit.trace(lambda x: pyvolconv.conv3d(x, w, b, padding=padding), x)
    assert "pyvolconv::" not in str(traced.graph)
    assert_close(traced(x), padded_by_torch(x, w, b, padding))


@pytest.mark.parametrize(
    "padding",
    [((1, 1),) * 2, ((1, 1),) * 4, ((1, 1, 1),) * 3, ((1, -1),) * 3, ((1.0, 1),) * 3, ((True, 1),) * 3, ("11",) * 3],
)
def test_other_pairs_are_refused_in_torchs_words(padding):
    x, w = torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3)
    pyvolconv.conv3d(x, w, padding=((1, 1),) * 3)
    arguments = (x, w, None, 1, padding, 1, 1)
    assert_same_outcome(outcome(pyvolconv.conv3d, *arguments), outcome(F.conv3d, *arguments))


@pytest.mark.parametrize("x", [torch.ones(1, 3, 4, 4, 4), torch.ones(1, 2, 4, 4, 4).double(), torch.ones(4, 4, 4)])
def test_pairs_with_other_faults_are_refused_for_those(x):
    w, padding = torch.ones(3, 2, 3, 3, 3), ((2, 0), (1, 1), (0, 0))
    expected = outcome(padded_by_torch, x, w, None, padding)
    assert isinstance(expected, RuntimeError)
    assert_same_outcome(outcome(pyvolconv.conv3d, x, w, padding=padding), expected)


def test_pairs_go_the_short_way(monkeypatch):
    from pyvolconv import shortcut

    x, w = torch.randn(1, 2, 4, 4, 4), torch.randn(3, 2, 3, 3, 3)
    shortcut._calls.clear()
    y = pyvolconv.conv3d(x, w, padding=((2, 0), (1, 1), (1, 1)))
    (call,) = shortcut._calls.values()
    assert call.problem.padding == ((2, 0), (1, 1), (1, 1))
    assert_close(y, padded_by_torch(x, w, None, ((2, 0), (1, 1), (1, 1))))


def test_pairs_as_a_modules_padding():
    """Torch's constructor takes them, and refuses every call."""
    layer = pyvolconv.Conv3d(2, 3, 3, padding=((2, 0), (1, 1), (1, 1)))
    x = torch.randn(1, 2, 4, 5, 6)
    expected = padded_by_torch(x, layer.weight, layer.bias, layer.padding)
    assert_close(layer(x), expected)
    chain = pyvolconv.accelerate(nn.Sequential(layer, nn.ReLU(), nn.MaxPool3d(2)))
    assert_close(chain(x), F.max_pool3d(F.relu(expected), 2))
