"""bfloat16 problems for which torch's own kernels crash or return what uninitialised memory held: not left to them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyvolconv
from pyvolconv.backends.aten import AtenBackend
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.dispatch import choose
from pyvolconv.problem import PASSES, ConvProblem

FAILING = (
    "ndhwc-n2ic32oc24-i1x5x30-k3-s2-p3x1x1-d2",
    "ncdhw-n3ic17oc4-i1x16x3-k3-s3x1x2-p3x1x3-d2",
    "ncdhw-n8ic3oc64-i1x8x5-k5-p2x0x2",
    "ndhwc-n3ic3oc2-i1x16x8-k3-p1x0x1",
    "ndhwc-n2g16ic16oc64-i1x5x16-k3-s1x2x2-p1x1x3",
    "ndhwc-n3ic8oc8-i1x8x8-k5-s2-p2x2x5",
    "ndhwc-n3ic2oc24-i1x16x1-k3-s2-p1",
    "ncdhw-n2ic17oc24-i3x16x1-k3-s2-p0x1x1",
    "ncdhw-n2ic32oc24-i3x1x1-k3-s3x1x2-p1",
    "ncdhw-n1ic1oc2-i1x3x3-k3-p1",
    "ndhwc-n2ic4oc2-i1x8x8-k1x3x3-s3x1x2-p0x1x0-d1x2x3",
)
"""Of some passes of these torch 2.13 is wrong on processors with AVX512_BF16."""


@pytest.mark.parametrize("text", FAILING)
def test_ours_computes_them(text):
    problem = ConvProblem.parse(f"cpu-bfloat16-{text}")
    assert all(choose(problem, pass_).name != "aten" for pass_ in PASSES)
    assert all(AtenBackend().unsupported_reasons(problem, pass_) for pass_ in PASSES)
    shapes = (problem.input_shape, problem.weight_shape)
    x, w = (
        torch.randn(shape).bfloat16().contiguous(memory_format=MEMORY_FORMAT[problem.layout]).requires_grad_()
        for shape in shapes
    )
    sizes = (problem.stride, [begin for begin, _ in problem.padding], problem.dilation, problem.groups)
    grad = torch.randn(problem.output_shape).bfloat16()
    results = [y := pyvolconv.conv3d(x, w, None, *sizes), *torch.autograd.grad(y, (x, w), grad)]
    exact_x, exact_w = (operand.detach().double().requires_grad_() for operand in (x, w))
    exact = F.conv3d(exact_x, exact_w, None, *sizes)
    for result, expected in zip(
        results, [exact, *torch.autograd.grad(exact, (exact_x, exact_w), grad.double())], strict=True
    ):
        torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_the_others_may_be_left_to_torch():
    for text in ("n2ic64oc64-i4x7x9-k3-p1", "n2ic64oc256-i16-k1", "n2ic16oc16-i3x5x5-k3-s2-p1"):
        problem = ConvProblem.parse(f"cpu-bfloat16-ndhwc-{text}")
        assert AtenBackend().unsupported_reasons(problem, "forward") == []
