"""Copies in the other layout (`layouts.in_layout`), and results of InstanceNorm3d written in it."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends import cpp_instance_norm
from pyvolconv.instance_norm import instance_norm_activation
from pyvolconv.layouts import in_layout

pytestmark = pytest.mark.skipif(not cpp_instance_norm.is_available(), reason="no compiled module")

SHAPES = [(2, 3, 4, 5, 6), (1, 16, 2, 4, 8), (3, 33, 5, 7, 9), (1, 1, 3, 4, 5), (2, 5, 1, 1, 1)]
LARGE = [(1, 32, 33, 64, 64), (1, 31, 34, 63, 65), (2, 48, 16, 48, 64)]
"""Results of 16 MiB and more, which are written past the caches where their lines are whole."""


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_copies(shape, dtype, isa, poisoned):
    x = torch.randn(shape, dtype=dtype)
    last = in_layout(x, "ndhwc")
    assert torch.equal(last, x)
    assert last.stride() == torch.empty(shape).to(memory_format=torch.channels_last_3d).stride()
    assert torch.equal(in_layout(last, "ncdhw"), x)
    assert in_layout(last, "ncdhw").is_contiguous()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2:] != (1, 1, 1)] + LARGE, ids=str)
def test_norm_writes_planes(shape, isa, threads):
    x = in_layout(torch.randn(shape), "ndhwc")
    kept = instance_norm_activation(x, None, None, activation="relu", keep_channels_last=True)
    for count in (1, 2):
        threads(count)
        planes = instance_norm_activation(x, None, None, activation="relu")
        assert planes.is_contiguous()
        assert torch.equal(planes, kept)


def test_gradients_come_back_in_the_layout_of_the_operand():
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(in_layout(x, "ndhwc").square().sum(), x, create_graph=True)
    assert grad.is_contiguous()
    assert torch.equal(grad, 2 * x)
    assert torch.autograd.gradcheck(lambda one: in_layout(one, "ndhwc") ** 2, x)
    assert torch.autograd.gradgradcheck(lambda one: in_layout(one, "ndhwc") ** 2, x)


def test_other_tensors_are_copied_by_torch():
    x = torch.randn(2, 3, 4, 5, 6)[..., ::2]
    assert in_layout(x, "ndhwc").is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(in_layout(x.half(), "ndhwc"), x.half())
