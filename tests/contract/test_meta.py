"""Layers on the meta device: shapes, dtypes and gradients as torch's, and no arithmetic."""

from __future__ import annotations

import pytest
import torch

from .layers import assert_same_outcome, outcome, pair

OPTIONS = [{}, {"padding": 1, "stride": 2, "groups": 2}, {"dilation": 2, "padding": 2, "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 7, 8, 9), (4, 7, 8, 9), (0, 4, 7, 8, 9)])
def test_results_and_gradients(kind, name, shape, options):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        check(kind, name, shape, options, dtype)


def check(kind, name, shape, options, dtype):
    ours, theirs = (layer.to("meta") for layer in pair(kind, name, 4, 6, 3, **options, dtype=dtype))
    results = []
    for layer in (ours, theirs):
        x = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        y = layer(x)
        y.backward(torch.empty_like(y))
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for got, expected in zip(*results, strict=True):
        assert_same_outcome(got, expected)
        assert got.is_meta
        assert got.stride() == expected.stride()


def test_a_volume_that_no_memory_holds(kind, name):
    ours, theirs = (layer.to("meta") for layer in pair(kind, name, 4, 6, 3, padding=1))
    x = torch.empty(8, 4, 4096, 4096, 4096, device="meta")
    assert_same_outcome(ours(x), theirs(x))


@pytest.mark.parametrize("shape", [(1, 3, 5, 5, 5), (1, 4, 2, 5, 5), (4, 5)])
def test_errors(kind, name, shape):
    ours, theirs = (layer.to("meta") for layer in pair(kind, name, 4, 6, 3))
    x = torch.empty(shape, device="meta")
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))
