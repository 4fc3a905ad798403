"""The patch embedding of a vision tower: a convolution whose stride is its kernel, in the dtypes of such models."""

from __future__ import annotations

import copy

import pytest
import torch

import pyvolconv

from .conftest import require_package
from .networks import qwen2_vl_patches

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    """As near to the exact result as torch is, and half a unit in the last place of it, where torch was lucky."""
    require_package("transformers")
    network = qwen2_vl_patches(96, 48)
    model = network.model.to(dtype)
    ours = pyvolconv.accelerate(copy.deepcopy(model))
    (x,) = (each.to(dtype) for each in network.inputs)
    grad = torch.randn(96, 48).to(dtype)

    def results(model, x, grad):
        y = model(x)
        y.backward(grad)
        return y.detach(), model.proj.weight.grad

    # The module casts its input to the weight's dtype.
    exact = results(copy.deepcopy(model).double(), x.double(), grad.double())
    for got, expected, true in zip(results(ours, x.float(), grad), results(model, x.float(), grad), exact, strict=True):
        assert got.dtype == expected.dtype == dtype
        assert got.shape == expected.shape
        half_unit = torch.finfo(dtype).eps / 2 * true.norm()
        assert (got.double() - true).norm() <= 2 * (expected.double() - true).norm() + half_unit
