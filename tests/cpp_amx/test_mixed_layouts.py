"""Forward passes in ndhwc of contiguous operands (`Backend.mixes_layouts`)."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyvolconv.backends.registry import REGISTRY
from pyvolconv.problem import ConvProblem

from ..closeness import assert_close

MIXING = [backend for backend in REGISTRY if backend.mixes_layouts]
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def test_some_do():
    assert {backend.name for backend in MIXING} == {"cpp.amx", "cpp.winograd"}


@pytest.mark.parametrize("mixing", MIXING, ids=lambda one: one.name)
@pytest.mark.parametrize(
    "text", ["n2ic20oc33-i9x10x18-k3-p1-bias", "n1ic5oc7-i5x6x9-k3-s2-p1", "n1ic64oc40-i12-k3-p1-bias"]
)
def test_same_results(mixing, text, require, poisoned):
    problem = ConvProblem.parse(f"cpu-float32-ndhwc-{text}")
    require(mixing, problem, "forward")
    x, weight = torch.randn(problem.input_shape), torch.randn(problem.weight_shape)
    bias = torch.randn(problem.out_channels) if problem.bias else None
    results = [
        mixing.forward(problem, x.contiguous(memory_format=of_x), weight.contiguous(memory_format=of_weight), bias)
        for of_x, of_weight in itertools.product(FORMATS if "x" in mixing.mixes_layouts else FORMATS[1:], FORMATS)
    ]
    for got in results:
        assert got.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(got, results[-1], rtol=1e-5, atol=1e-4)


def test_operands_without_parts(require):
    """What `cpp.amx` leaves to `cpp.direct`."""
    backend = next(backend for backend in MIXING if backend.name == "cpp.amx")
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc5-i6-k1")
    require(backend, problem, "forward")
    x, weight = torch.randn(problem.input_shape), torch.randn(problem.weight_shape)
    x[0, 1, 2, 3, 4] = torch.inf
    expected = torch.nn.functional.conv3d(x, weight)
    assert_close(backend.forward(problem, x, weight, None), expected, equal_nan=True)
