"""Problems for which torch's own kernels crash or return what uninitialised memory held: not left to them."""

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
"""Of some passes of these torch 2.13 is wrong in bfloat16 on processors with AVX512_BF16."""

CRASHING = (
    "ndhwc-n2ic32oc16-i9x2x1-k1x2x2-s1x1x2-p2x2x3-d1x1x2",
    "ndhwc-n2ic4oc16-i3x3x9-k5x1x5-s2x2x1-p3x0x2",
    "ndhwc-n2ic32oc16-i3x5x2-k5x1x2-s2x1x3-p3x0x2-d1x3x2",
    "ndhwc-n2ic4oc1-i3x4x2-k5x3x2-s2-p3x1x0",
    "ncdhw-n2ic32oc16-i4x4x5-k5x2x5-s2x1x2-p3x0x1-d1x3x1",
    "ncdhw-n2ic16oc1-i3x4x1-k2x1x1-s3x1x1-p3x2x1-d3x2x1",
)
"""Of some passes of these torch 2.13 is wrong, or crashes, in float32 on processors with AVX-512."""

PROBLEMS = [f"cpu-bfloat16-{text}" for text in FAILING] + [
    f"cpu-{dtype}-{text}" for text in CRASHING for dtype in ("float32", "float16", "bfloat16")
]
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 3e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("text", PROBLEMS)
def test_ours_computes_them(text):
    problem = ConvProblem.parse(text)
    dtype = getattr(torch, problem.dtype)
    assert all(choose(problem, pass_).name != "aten" for pass_ in PASSES)
    assert all(AtenBackend().unsupported_reasons(problem, pass_) for pass_ in PASSES)
    shapes = (problem.input_shape, problem.weight_shape)
    x, w = (
        torch.randn(shape).to(dtype).contiguous(memory_format=MEMORY_FORMAT[problem.layout]).requires_grad_()
        for shape in shapes
    )
    sizes = (problem.stride, [begin for begin, _ in problem.padding], problem.dilation, problem.groups)
    grad = torch.randn(problem.output_shape).to(dtype)
    results = [y := pyvolconv.conv3d(x, w, None, *sizes), *torch.autograd.grad(y, (x, w), grad)]
    exact_x, exact_w = (operand.detach().double().requires_grad_() for operand in (x, w))
    tolerance = TOLERANCE[dtype]
    exact = F.conv3d(exact_x, exact_w, None, *sizes)
    for result, expected in zip(
        results, [exact, *torch.autograd.grad(exact, (exact_x, exact_w), grad.double())], strict=True
    ):
        torch.testing.assert_close(
            result.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


def test_the_others_may_be_left_to_torch():
    for text in (
        "n2ic64oc64-i4x7x9-k3-p1",
        "n2ic64oc256-i16-k1",
        "n2ic16oc16-i3x5x5-k3-s2-p1",
        "n1ic3oc64-i16-k7-s2-p3",
    ):
        for dtype in ("float32", "float16", "bfloat16"):
            problem = ConvProblem.parse(f"cpu-{dtype}-ndhwc-{text}")
            assert AtenBackend().unsupported_reasons(problem, "forward") == []
