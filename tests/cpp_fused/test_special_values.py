"""Ties, NaN, infinities and zero gradients resolve as in torch; nothing of an earlier call leaks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.epilogue import NO_VOXEL
from pyvolconv.problem import LAYOUTS, ConvProblem

from .checks import check_integers, dense_in, expected, random_code, random_grad
from .problems import parse, plain


def constant_problem(text: str, layout: str, bias: float) -> tuple[ConvProblem, list[Tensor]]:
    """A convolution with weights of 1 at single taps, so that its results are the input plus `bias`."""
    problem = parse(text, layout)
    x = torch.randn(problem.input_shape).contiguous(memory_format=MEMORY_FORMAT[layout])
    weight = torch.eye(problem.in_channels).view(problem.weight_shape)
    return problem, [x, weight.contiguous(memory_format=MEMORY_FORMAT[layout]), torch.full((x.shape[1],), bias)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu(0.25)"])
@pytest.mark.parametrize("pool", ["2", "2ceil", "3s2p1", "2s1", "1x2x3"])
def test_ties_nan_and_infinities_resolve_as_torch(fused, layout, activation, pool):
    text = f"n2ic9oc9-i5x7x21-k1-bias-{activation}-pool{pool}"
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
    for share, bias in ((0.0, -20.0), (0.0, 0.0), (0.3, 0.0), (1.0, 0.0)):
        problem, (x, weight, offset) = constant_problem(text, layout, bias)
        chosen = specials[torch.randint(len(specials), x.shape)]
        x = torch.where(torch.rand(x.shape) < share, chosen, x.round()).contiguous(memory_format=MEMORY_FORMAT[layout])
        # One channel at a time: zero times an infinity of another channel is NaN.
        problem = problem.with_(groups=9)
        weight = torch.ones(problem.weight_shape).contiguous(memory_format=MEMORY_FORMAT[layout])
        value, code = fused.forward(problem, x, weight, offset)
        # Contiguous: torch 2.13 names a voxel of another window where all of a channels-last one are -infinity.
        want_value, want_code = expected(problem, (x + offset.view(-1, 1, 1, 1)).contiguous())
        assert torch.equal(value.nan_to_num(nan=1e30), want_value.nan_to_num(nan=1e30))
        assert torch.equal(code, want_code)


def test_zero_gradients_are_skipped_and_nan_reaches_its_own_values_only(fused):
    for layout, channels in itertools.product(LAYOUTS, (3, 8, 16)):
        problem = parse(f"n1ic{channels}oc9-i6x8x20-k3-p1-relu-pool2", layout)
        weight = dense_in(problem, torch.randn(problem.weight_shape))
        x = dense_in(problem, torch.randn(problem.input_shape))
        grad, code = torch.zeros(problem.pooled_shape), torch.zeros(problem.pooled_shape, dtype=torch.uint8)
        grad[0, 4, 1, 2, 3], code[0, 4, 1, 2, 3] = float("nan"), 5
        grad, code = dense_in(problem, grad), dense_in(problem, code)
        hit = fused.grad_input(problem, grad, code, weight).isnan()
        assert hit[0, :, 2:5, 3:6, 6:9].all()
        assert hit.sum() == channels * 27
        of_weight, of_bias = fused.grad_weight(problem, grad, code, x)
        for hit in (of_weight.isnan(), of_bias.isnan()):
            assert hit[4].all()
            assert hit.sum() == hit[4].numel()
        code[code == 5] = NO_VOXEL
        assert not fused.grad_input(problem, grad, code, weight).any()
        assert not any(result.any() for result in fused.grad_weight(problem, grad, code, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_window_chose_is_never_read(fused, value):
    """Without a chosen voxel there is no product: zero times an infinity would be NaN."""
    for layout, channels, stride in itertools.product(LAYOUTS, (1, 2, 4, 9), (1, 2)):
        problem = parse(f"n1ic{channels}oc16-i7x8x13-k3-s{stride}-p1-relu-pool2ceil", layout)
        x = dense_in(problem, torch.full(problem.input_shape, value))
        grad = dense_in(problem, torch.randn(problem.pooled_shape))
        code = dense_in(problem, torch.full(problem.pooled_shape, NO_VOXEL, dtype=torch.uint8))
        assert not any(result.any() for result in fused.grad_weight(problem, grad, code, x))


def test_scratch_of_a_larger_problem_does_not_leak(fused, operands, reference):
    """Scratch memory is kept between calls: what a NaN problem left there must not reach the next result."""
    for layout in LAYOUTS:
        large = parse("n2ic20oc24-i6x7x33-k3-p2-relu-pool2", layout)
        nan = float("nan")
        args = [arg.fill_(nan) for arg in operands(plain(large), "forward")]
        fused.forward(large, *args, None)
        grad, code = random_grad(large, integers=False).fill_(nan), random_code(large)
        fused.grad_input(large, grad, code, args[1])
        fused.grad_weight(large, grad, code, args[0])
        for text in (
            "n1ic3oc5-i4x5x6-k3-p1-relu-pool2",
            "n1ic9oc5-i4x5x9-k3-p1-relu-pool2",
            "n1ic1oc5-i4x5x9-k3-pool2",
        ):
            check_integers(fused, parse(text, layout), operands, reference)
