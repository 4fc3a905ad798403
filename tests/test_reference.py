"""The reference of all numeric tests, ATen in float64, against the defining sum written out; and the bound itself."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.base import Accuracy
from pyvolconv.problem import ConvProblem

from .error_bound import largest_constant

TINY = (
    "n2ic2oc3-i3x4x3-k2x3x2-p1-bias",
    "n1ic3oc2-i5x4x5-k3x2x2-s2x1x3-p1x0x2-d1x2x1",
    "n1g2ic4oc2-i4x3x4-k2-s3x2x1-p2x1x0-d2x3x1",
    "n2ic1oc2-i3x3x4-k2x2x4-p0+1x2+0x1+2-bias",
    "n1g3ic3oc6-i5x4x3-k1x2x3-s4x2x1",
)


@pytest.mark.parametrize("text", TINY)
def test_reference_is_the_definition(text, pass_, operands, products, reference):
    problem = ConvProblem.parse(f"cpu-float64-ncdhw-{text}")
    args = operands(problem, pass_, integers=True)
    if pass_ == "forward":
        x, weight, *bias = args
        expected = torch.zeros(problem.output_shape, dtype=torch.float64)
        if bias:
            expected += bias[0].view(-1, 1, 1, 1)
        for at_x, at_w, at_y in products(problem):
            expected[at_y] += x[at_x] * weight[at_w]
    elif pass_ == "grad_input":
        grad_output, weight = args
        expected = torch.zeros(problem.input_shape, dtype=torch.float64)
        for at_x, at_w, at_y in products(problem):
            expected[at_x] += grad_output[at_y] * weight[at_w]
    else:
        grad_output, x = args
        expected = torch.zeros(problem.weight_shape, dtype=torch.float64)
        for at_x, at_w, at_y in products(problem):
            expected[at_w] += grad_output[at_y] * x[at_x]
    assert torch.equal(reference(problem, pass_, args), expected)


def test_bound_refuses_one_missing_product(float32_problem, pass_, operands, reference, error_in_bounds):
    """The planted error: one tap left out for one value of the result, in every problem of the set."""
    problem = float32_problem
    args = operands(problem, pass_)
    accuracy = Accuracy(largest_constant(problem, pass_), problem.dtype, bitwise_reproducible=True)
    correct = reference(problem, pass_, args)
    assert error_in_bounds(correct.to(args[0].dtype), problem, pass_, args, accuracy) <= 1

    # A product of average size, taken from the value that sums the most.
    magnitude = reference(problem, pass_, [arg.abs() for arg in args])
    at = int(magnitude.argmax())
    planted = correct.clone()
    planted.view(-1)[at] -= magnitude.view(-1)[at] / problem.reduction_length(pass_)
    assert error_in_bounds(planted.to(args[0].dtype), problem, pass_, args, accuracy) > 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_bound_refuses_a_value_that_is_no_number(wrong, operands, reference, error_in_bounds):
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i4x4x4-k3-p1")
    args = operands(problem, "forward")
    y = reference(problem, "forward", args).float()
    y[0, 1, 2, 3, 0] = wrong
    assert error_in_bounds(y, problem, "forward", args, Accuracy(1.0, "float32", True)) == torch.inf


def test_bound_refuses_a_value_where_nothing_is_summed(operands, reference, error_in_bounds):
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i5x5x5-k1-s2")
    args = operands(problem, "grad_input")
    grad = reference(problem, "grad_input", args).float()
    assert error_in_bounds(grad, problem, "grad_input", args, Accuracy(1.0, "float32", True)) <= 1
    grad[0, 0, 1, 0, 0] = 1e-30
    assert error_in_bounds(grad, problem, "grad_input", args, Accuracy(1.0, "float32", True)) == torch.inf
