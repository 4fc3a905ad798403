"""Infinity, NaN and what overflows in between: what the direct convolution gives."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.cpp import plan_of
from pyvolconv.backends.cpp_winograd import SCHEMES
from pyvolconv.problem import LAYOUTS

from .problems import _C, ALL, STRIDED, needs_extension, problem_of, run, tile

pytestmark = needs_extension


@pytest.mark.parametrize(
    ("kernel", "outputs", "dilation", "stride"),
    [(kernel, outputs, dilation, (1, 1, 1)) for kernel, outputs in ALL for dilation in ((1, 1, 1), (2, 1, 3))]
    + [(kernel, outputs, (1, 1, 1), stride) for kernel, stride, outputs in STRIDED],
)
@pytest.mark.parametrize("where", ["source", "weight"])
def test_infinity_and_nan_reach_only_what_depends_on_them(isa, kernel, outputs, dilation, stride, where, operands):
    """The same voxels are infinite, negative infinite and NaN as in the direct convolution of the same values."""
    problem = problem_of("n1ic6oc17-i7x8x13", kernel, "float32", "ndhwc", dilation=dilation, stride=stride)
    x, weight = operands(problem, "forward")
    hit = x if where == "source" else weight
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    places = torch.randperm(hit.numel())[:5]
    for place, value in zip(places.tolist(), values.repeat(2), strict=False):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), hit.shape))
        hit[index] = value
    direct = torch.empty(problem.output_shape).contiguous(memory_format=torch.channels_last_3d)
    _C.forward(plan_of(problem), x.data_ptr(), weight.data_ptr(), 0, direct.data_ptr())
    got = run(problem, outputs, "forward", [x, weight])
    assert not direct.isfinite().all()
    assert torch.equal(got.isnan(), direct.isnan())
    torch.testing.assert_close(got, direct, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(("kernel", "stride", "outputs"), STRIDED)
def test_infinity_and_nan_in_a_strided_gradient(isa, kernel, stride, outputs, operands):
    problem = problem_of("n1ic17oc6-i9x8x13", kernel, "float32", "ndhwc", stride=stride)
    grad_output, weight = operands(problem, "grad_input")
    for hit, values in ((grad_output, (float("inf"), float("nan"), 3e38)), (weight, (-float("inf"), float("nan")))):
        for value in values:
            place = tuple(int(torch.randint(size, ())) for size in hit.shape)
            kept = hit[place].clone()
            hit[place] = value
            direct = torch.empty(problem.input_shape).contiguous(memory_format=torch.channels_last_3d)
            _C.grad_input(plan_of(problem), grad_output.data_ptr(), weight.data_ptr(), direct.data_ptr())
            got = run(problem, tile(outputs, stride, "grad_input"), "grad_input", [grad_output, weight])
            torch.testing.assert_close(got, direct, rtol=1e-3, atol=1e-3, equal_nan=True)
            hit[place] = kept


@pytest.mark.parametrize(
    ("outputs", "stride"),
    [((2, 2, 2), (1, 1, 1)), ((1, 2, 2), (1, 1, 1)), ((2, 1, 1), (1, 1, 1)), ((2, 2, 2), (2, 2, 2))],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_weight_gradient_that_is_not_finite_is_the_direct_one(isa, outputs, stride, value, operands):
    """3e38: sums of the transforms overflow, the gradient itself does not."""
    kernel = tuple(1 if m == 1 else 3 for m in outputs)
    for layout, hit in itertools.product(LAYOUTS, (0, 1)):
        shape = "n1ic6oc17-i7x8x13" if stride == (1, 1, 1) else "n1ic6oc17-i13x16x25"
        problem = problem_of(shape, kernel, "float32", layout, stride=stride)
        args = operands(problem, "grad_weight")
        if value == 3e38:
            args[1 - hit].zero_()
            args[1 - hit][0, 1, 3, 4, 5] = 1e-3
            args[hit].fill_(value)
        else:
            args[hit][0, 1, 0, 4, 6] = value
        direct = torch.empty(problem.weight_shape).contiguous(memory_format=MEMORY_FORMAT[layout])
        _C.grad_weight(plan_of(problem), args[0].data_ptr(), args[1].data_ptr(), direct.data_ptr())
        assert torch.equal(direct.isfinite().all(), torch.tensor(value == 3e38))
        assert torch.equal(run(problem, outputs, "grad_weight", args).nan_to_num(nan=7.0), direct.nan_to_num(nan=7.0))


def test_no_overflow_that_the_convolution_does_not_have(isa, operands):
    """Transforms add what the convolution subtracts; a tile that overflows in between is computed directly."""
    problem = problem_of("n1ic4oc8-i6x6x8", (3, 3, 3), "float32", "ndhwc")
    x, weight = operands(problem, "forward")
    x.fill_(1.5e38)
    weight.fill_(0)
    weight[:, 0, 1, 1, 1] = 1
    for outputs in SCHEMES[3, 3, 3]["high"]:
        assert torch.equal(run(problem, outputs, "forward", [x, weight]), torch.full(problem.output_shape, 1.5e38))
