"""Fused with a pool: values and codes of torch's max_pool3d on the same sums."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.cpp import pooled_plan_of
from pyvolconv.backends.cpp_winograd import SCHEMES
from pyvolconv.epilogue import NO_VOXEL
from pyvolconv.problem import LAYOUTS, ConvProblem

from ..closeness import assert_close
from .problems import _C, needs_extension, run

pytestmark = needs_extension


@pytest.mark.parametrize(
    ("outputs", "stride"), [(outputs, 1) for outputs in SCHEMES[3, 3, 3]["high"]] + [((2, 2, 2), 2)]
)
def test_pool_chooses_among_the_same_sums(isa, outputs, stride):
    """Fused with a pool the sums have the same bits as without: values and codes are those of torch's max_pool3d."""
    for shape, layout in itertools.product(("n2ic16oc24-i5x7x9", "n1ic3oc40-i8x4x16"), LAYOUTS):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-{shape}-k3-s{stride}-p1-bias-relu-pool2ceil")
        plain = problem.with_(activation="none", pool=None)
        x, weight = (
            torch.randn(s).contiguous(memory_format=MEMORY_FORMAT[layout])
            for s in (problem.input_shape, problem.weight_shape)
        )
        bias = torch.randn(problem.out_channels)
        dense = run(plain, outputs, "forward", [x, weight, bias]).relu()
        expected = torch.nn.functional.max_pool3d(dense, 2, ceil_mode=True)
        pooled, code = (
            torch.empty(problem.pooled_shape, dtype=dtype).contiguous(memory_format=MEMORY_FORMAT[layout])
            for dtype in (torch.float32, torch.uint8)
        )
        addresses = [t.data_ptr() for t in (x, weight, bias, pooled, code)]
        _C.winograd_forward_max_pool(pooled_plan_of(problem), outputs, *addresses)
        assert torch.equal(pooled, expected)
        pooled.fill_(float("nan"))
        _C.winograd_forward_max_pool(pooled_plan_of(problem), outputs, *addresses[:4], 0)
        assert torch.equal(pooled, expected), "without codes"
        assert torch.equal(code == NO_VOXEL, expected == 0)
        code[code == NO_VOXEL] = 0  # a window of zeros
        d, h, w = (torch.arange(size) for size in problem.pooled_size)
        at = (
            ((2 * d[:, None, None] + code // 4) * dense.shape[3] + 2 * h[:, None] + code // 2 % 2) * dense.shape[4]
            + 2 * w
            + code % 2
        )
        assert torch.equal(dense.flatten(2).gather(2, at.flatten(2)).view_as(pooled), pooled)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("outputs", SCHEMES[3, 3, 3]["default"])
def test_pooled_values_with_biases_that_are_not_finite(isa, outputs, activation):
    """With codes and without: torch's maximum of NaN is NaN, and a ReLU keeps it."""
    epilogue = "" if activation == "none" else f"-{activation}"
    problem = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc24-i5x7x9-k3-p1-bias{epilogue}-pool2ceil")
    x, weight = (
        torch.randn(s).contiguous(memory_format=MEMORY_FORMAT["ndhwc"])
        for s in (problem.input_shape, problem.weight_shape)
    )
    bias = torch.randn(24)
    bias[3], bias[4], bias[20] = float("nan"), float("inf"), -float("inf")
    dense = torch.nn.functional.conv3d(x, weight, bias, padding=1)
    expected = torch.nn.functional.max_pool3d(dense.relu() if epilogue else dense, 2, ceil_mode=True)
    pooled, code = (
        torch.empty(problem.pooled_shape, dtype=dtype).contiguous(memory_format=MEMORY_FORMAT["ndhwc"])
        for dtype in (torch.float32, torch.uint8)
    )
    for address in (code.data_ptr(), 0):
        pooled.fill_(7)
        _C.winograd_forward_max_pool(
            pooled_plan_of(problem), outputs, *(t.data_ptr() for t in (x, weight, bias, pooled)), address
        )
        assert_close(pooled, expected, equal_nan=True)
