"""Schemes whose constants are powers of two are exact on integers."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

from .problems import SHAPES, STRIDED, needs_extension, problem_of, run, tile

pytestmark = needs_extension


@pytest.mark.parametrize("outputs", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_exact_on_integers(isa, outputs, operands, reference):
    """The constants of F(2, 3) are powers of two."""
    kernel = tuple(1 if m == 1 else 3 for m in outputs)
    for shape, pass_, layout in itertools.product(SHAPES, PASSES, LAYOUTS):
        problem = problem_of(shape, kernel, "float32", layout)
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, outputs, pass_, args).double(), reference(problem, pass_, args))


@pytest.mark.parametrize("padding", ["0", "4x1x2", "3+0x0+5x7+2"])
def test_exact_on_integers_with_dilation(isa, padding, operands, reference):
    for dilation, pass_, layout in itertools.product(("2", "3x1x4"), PASSES, LAYOUTS):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-n2ic5oc20-i9x8x13-k3-p{padding}-d{dilation}")
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, (2, 2, 2), pass_, args).double(), reference(problem, pass_, args))


@pytest.mark.parametrize(("kernel", "stride", "outputs"), STRIDED)
def test_strides_are_exact_on_integers(isa, kernel, stride, outputs, operands, reference):
    """All constants are 1 or -1. Paddings of one side, wider than the kernel; also with dilation."""
    kernel, step = ("x".join(map(str, each)) for each in (kernel, stride))
    depth = "0" if outputs[0] == 1 else "3+1"
    paddings = (
        f"p{depth}x1x1",
        f"p{depth}x1+4x3+0",
        f"p{depth}x5x1+2",
        "p0",
        f"p{depth}x4x0+3",
        f"p{depth}x2x3-d1x2x3",
    )
    for padding, pass_, layout in itertools.product(paddings, PASSES, LAYOUTS):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-n2ic5oc20-i9x10x15-k{kernel}-s{step}-{padding}")
        if pass_ == "grad_input" and any(
            s == 2 and p % 2 == 0 for s, (p, _) in zip(stride, problem.padding, strict=True)
        ):
            continue
        args = operands(problem, pass_, integers=True)
        got = run(problem, tile(outputs, stride, pass_), pass_, args)
        assert torch.equal(got.double(), reference(problem, pass_, args))


def test_boxes_larger_than_caches(isa, operands, reference):
    """With weights beyond a core's cache boxes of tiles are, too."""
    for layout, pass_ in (("ndhwc", "forward"), ("ncdhw", "grad_input")):
        problem = problem_of("n1ic160oc160-i8x40x40", (3, 3, 3), "float64", layout)
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, (2, 2, 2), pass_, args), reference(problem, pass_, args))
