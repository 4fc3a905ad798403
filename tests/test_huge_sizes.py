"""Sizes that no tensor has: the class of error that torch raises, or its result where the size changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyvolconv

from .closeness import assert_close

BEYOND_INT64 = [2**63, 2**64, 2**70, -(2**64), (0, 0, 2**63)]


def outcome(convolve, **sizes):
    """Class of the error, or shape and values."""
    transposed = convolve.__name__ == "conv_transpose3d"
    x, w = torch.arange(128.0).view(1, 2, 4, 4, 4), torch.ones(2 if transposed else 3, 3 if transposed else 2, 3, 3, 3)
    if sizes.pop("pointwise", False):
        x, w = (x[..., :1, :1, :1] if transposed else x), w[..., :1, :1, :1]
    try:
        return convolve(x, w, **sizes).tolist()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("size", [2**62, 2**62 + 5, 2**63 - 1, -(2**62), (0, 0, 2**62), *BEYOND_INT64], ids=str)
@pytest.mark.parametrize("name", ["padding", "dilation"])
def test_conv3d(name, size):
    assert outcome(pyvolconv.conv3d, **{name: size}) == outcome(F.conv3d, **{name: size})


@pytest.mark.parametrize("name", ["stride", "padding", "output_padding", "dilation"])
def test_conv_transpose3d(name):
    """Torch wraps around to a size below zero, or to another one, or raises RuntimeError."""
    for size in BEYOND_INT64:
        assert outcome(pyvolconv.conv_transpose3d, **{name: size}) == outcome(F.conv_transpose3d, **{name: size})
    for size in (2**62, 2**63 - 1, (1, 1, 2**62)):
        assert outcome(pyvolconv.conv_transpose3d, **{name: size}) is RuntimeError


@pytest.mark.parametrize("padding", [2**61, 2**62 - 1])
def test_a_padding_that_torch_dies_of_or_may_raise_for(padding):
    assert issubclass(outcome(pyvolconv.conv3d, padding=padding), RuntimeError)


def test_steps_that_are_never_taken():
    assert outcome(pyvolconv.conv3d, dilation=2**62, pointwise=True) == outcome(F.conv3d, pointwise=True)
    for stride in (2**40, 2**61, 2**62, 2**63 - 1):
        assert outcome(pyvolconv.conv3d, stride=stride) == outcome(F.conv3d, stride=4)
    for stride in BEYOND_INT64:
        assert outcome(pyvolconv.conv3d, stride=stride) == outcome(F.conv3d, stride=stride)
    for name in ("stride", "dilation"):
        single = outcome(F.conv_transpose3d, pointwise=True)
        assert outcome(pyvolconv.conv_transpose3d, **{name: 2**63 - 1}, pointwise=True) == single


@pytest.mark.parametrize("name", ["cpp.direct", "im2col", "numba", "aten"])
def test_gradients_of_a_stride_that_is_never_taken(name):
    def gradients(convolve, stride):
        x = torch.arange(128.0).view(1, 2, 4, 4, 4).requires_grad_()
        w = torch.ones(3, 2, 3, 3, 3, requires_grad=True)
        return torch.autograd.grad(convolve(x, w, stride=stride, padding=1).square().sum(), (x, w))

    with pyvolconv.use_backend(name):
        assert_close(gradients(pyvolconv.conv3d, 2**61), gradients(F.conv3d, 6))
