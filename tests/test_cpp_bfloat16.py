"""`cpp.bfloat16`: dot products of bfloat16 pairs, for bfloat16 and, where torch's switch says so, for float32."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.base import Accuracy
from pyvolconv.backends.cpp_bfloat16 import CppBfloat16
from pyvolconv.dispatch import choose
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

BACKEND = CppBfloat16()
TEXTS = (
    "n2ic64oc64-i4x7x9-k3-p1-bias",
    "n2ic5oc7-i5x6x7-k3x2x3-s2x1x2-p1x1x0",  # an odd channel, residues of the stride
    "n1ic3oc50-i6x7x40-k3-p1-d2x1x2-bias",
    "n2ic34oc40-i4-k1-bias",  # one row of height and width
    "n1ic600oc20-i3x4x5-k3-p1",  # chunks of source channels, the last of them shorter
    "n2ic33oc18-i9-k2-s2",  # a voxel that no window covers
    "n1ic1oc1-i5-k3-p2",
    "n2ic20oc17-i5x6x40-k1x3x3-s1x3x3",  # taps packed apart from one another
)


@pytest.fixture(params=PASSES[:2])
def gathering(request):
    return request.param


@pytest.fixture
def float32_in_bfloat16():
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.conv.fp32_precision = before


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request):
    if request.param == "float32":
        request.getfixturevalue("float32_in_bfloat16")
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", TEXTS)
def test_integers(text, layout, dtype, gathering, require, operands, run_pass, reference, poisoned):
    """Products and sums are exact; a bfloat16 result is rounded once, ties to even."""
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
    require(BACKEND, problem, gathering)
    args = operands(problem, gathering, integers=True)
    got = run_pass(BACKEND, problem, gathering, args)
    assert torch.equal(got, reference(problem, gathering, args).to(got.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", TEXTS)
def test_bound(text, layout, dtype, gathering, require, operands, run_pass, assert_within_bound):
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
    require(BACKEND, problem, gathering)
    args = operands(problem, gathering)
    assert_within_bound(
        run_pass(BACKEND, problem, gathering, args), problem, gathering, args, BACKEND.accuracy(problem, gathering)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_operands_are_rounded_once(
    layout, gathering, float32_in_bfloat16, require, operands, run_pass, assert_within_bound
):
    """With operands that bfloat16 holds the error is that of a float32 sum, and others are rounded to these."""
    problem = ConvProblem.parse(f"cpu-float32-{layout}-n2ic19oc21-i4x5x20-k3-p1")
    require(BACKEND, problem, gathering)
    args = operands(problem, gathering)
    rounded = [arg.bfloat16().float() for arg in args]
    got = run_pass(BACKEND, problem, gathering, args)
    assert torch.equal(got, run_pass(BACKEND, problem, gathering, rounded))
    assert_within_bound(got, problem, gathering, rounded, Accuracy(1.0, "float32", bitwise_reproducible=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, layout, dtype, require, operands, run_pass):
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-n1ic3oc2-i3x4x20-k1")
    require(BACKEND, problem, "forward")
    x, weight = operands(problem, "forward")
    x[0, 2, 1, 2, 17] = value
    if value != value and dtype == "float32":
        # Its only bit below the exponent is one that bfloat16 does not have.
        x[0, 2, 1, 2, 17] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    got = run_pass(BACKEND, problem, "forward", [x, weight])
    expected = torch.zeros_like(got, dtype=torch.bool)
    expected[0, :, 1, 2, 17] = True
    assert torch.equal(~got.isfinite(), expected)
    assert torch.equal(got.isnan(), expected & (value != value))


def test_numbers_below_the_normal_ones_count_as_zero(require, run_pass):
    problem = ConvProblem.parse("cpu-bfloat16-ndhwc-n1ic2oc1-i1-k1")
    require(BACKEND, problem, "forward")
    x = torch.tensor([1e-39, 2.0], dtype=torch.bfloat16).view(problem.input_shape)
    weight = torch.tensor([2.0**20, 1.0], dtype=torch.bfloat16).view(problem.weight_shape)
    assert run_pass(BACKEND, problem, "forward", [x, weight]).item() == 2.0


def test_same_bits_for_every_thread_count(dtype, gathering, require, operands, run_pass, threads):
    problem = ConvProblem.parse(f"cpu-{dtype}-ndhwc-n2ic34oc40-i8x9x10-k3-p1")
    require(BACKEND, problem, gathering)
    args = operands(problem, gathering)
    threads(1)
    first = run_pass(BACKEND, problem, gathering, args)
    for count in (2, 3):
        threads(count)
        assert torch.equal(run_pass(BACKEND, problem, gathering, args), first)


def test_float32_only_where_torch_is_told_so(gathering, require):
    """The switch counts from the next call on, in both directions."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n4ic32oc32-i32-k5-p2")
    before = torch.backends.mkldnn.conv.fp32_precision
    assert choose(problem, gathering).name != BACKEND.name
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        require(BACKEND, problem, gathering)
        assert choose(problem, gathering).name in (BACKEND.name, "cpp.amx")  # the latter where there is a matrix unit
        assert choose(problem.with_(dtype="float64"), gathering).name != BACKEND.name
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    assert choose(problem, gathering).name != BACKEND.name
