"""Sizes that cut tiles and boxes, in every scheme: within the declared error, the same bits on any number of threads.

The backend chooses among these schemes by cost; here each runs on every shape, on every instruction set.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from pyvolconv.problem import LAYOUTS, PASSES

from .problems import _C, ALL, BLOCKED, SHAPES, STRIDED, accuracy_of, needs_extension, problem_of, run, tile

pytestmark = needs_extension


@pytest.mark.parametrize(("kernel", "outputs"), ALL)
def test_within_bound_and_same_bits(kernel, outputs, pass_, operands, assert_within_bound, threads, use_isa):
    if pass_ == "grad_weight" and 4 in outputs:
        with pytest.raises(ValueError, match="one or two outputs per tile"):
            run(problem_of(SHAPES[0], kernel, "float32", "ndhwc"), outputs, pass_, [torch.zeros(1), torch.zeros(1)])
        return
    for shape, dtype, layout in itertools.product(SHAPES, ("float32", "float64"), LAYOUTS):
        problem = problem_of(shape, kernel, dtype, layout)
        args = operands(problem, pass_)
        for isa in _C.supported_isas():
            use_isa(isa)
            threads(1)
            got = run(problem, outputs, pass_, args)
            assert_within_bound(got, problem, pass_, args, accuracy_of(outputs, dtype))
            threads(3)
            assert torch.equal(run(problem, outputs, pass_, args), got), f"other bits with 3 threads and {isa}"


@pytest.mark.parametrize(("kernel", "stride", "dilation", "outputs"), BLOCKED)
def test_blocks_of_channels_and_boxes_of_several_samples(
    kernel, stride, dilation, outputs, operands, reference, threads, use_isa
):
    """Blocks of 64 or 32 by 128 or 64 channels, the last ones narrower; with many, boxes hold more than one sample."""
    shapes = ("n2ic70oc150-i4x4x6", "n5ic65oc12-i3x6x4", "n3ic7oc131-i4x3x5", "n7ic280oc260-i2x3x3")
    for shape, dtype, layout in itertools.product(shapes, ("float32", "float64"), LAYOUTS):
        problem = problem_of(shape, kernel, dtype, layout, dilation=dilation, stride=stride)
        args = operands(problem, "grad_weight", integers=True)
        exact = reference(problem, "grad_weight", args)
        for isa, count in itertools.product(_C.supported_isas(), (1, 3)):
            use_isa(isa)
            threads(count)
            got = run(problem, outputs, "grad_weight", args)
            assert torch.equal(got.double(), exact), (shape, dtype, layout, isa, count)


@pytest.mark.parametrize("padding", [(0, 0, 0), (2, 0, 1), (3, 4, 2)])
def test_paddings(isa, padding, operands, assert_within_bound):
    for outputs, pass_ in itertools.product(((2, 2, 2), (2, 2, 4)), PASSES):
        if pass_ == "grad_weight" and 4 in outputs:
            continue
        problem = problem_of("n1ic8oc16-i4x5x9", (3, 3, 3), "float32", "ndhwc", padding)
        args = operands(problem, pass_)
        assert_within_bound(run(problem, outputs, pass_, args), problem, pass_, args, accuracy_of(outputs, "float32"))


@pytest.mark.parametrize(("kernel", "outputs"), ALL)
@pytest.mark.parametrize("dilation", [(2, 2, 2), (3, 1, 2), (5, 12, 4)])
def test_dilation(isa, kernel, outputs, dilation, pass_, operands, assert_within_bound, threads):
    """Residues with several boxes, with parts of tiles, with one voxel and with none."""
    if pass_ == "grad_weight" and 4 in outputs:
        return
    lattice = (1, 1, 1) if pass_ == "grad_weight" else dilation  # taps are next to each other
    for shape, dtype, layout in (
        ("n2ic16oc24-i5x6x7", "float32", "ndhwc"),
        ("n1ic5oc33-i9x7x30", "float32", "ncdhw"),
        ("n1ic17oc8-i12x3x11", "float64", "ndhwc"),
    ):
        problem = problem_of(shape, kernel, dtype, layout, dilation=dilation)
        args = operands(problem, pass_)
        threads(1)
        got = run(problem, outputs, pass_, args)
        assert_within_bound(got, problem, pass_, args, accuracy_of(outputs, dtype, lattice))
        threads(3)
        assert torch.equal(run(problem, outputs, pass_, args), got)


@pytest.mark.parametrize(("kernel", "stride", "outputs"), STRIDED)
def test_strides(isa, kernel, stride, outputs, pass_, operands, assert_within_bound, threads):
    for shape, dtype, layout in itertools.product(SHAPES, ("float32", "float64"), LAYOUTS):
        problem = problem_of(shape, kernel, dtype, layout, stride=stride)
        args = operands(problem, pass_)
        threads(1)
        got = run(problem, tile(outputs, stride, pass_), pass_, args)
        assert_within_bound(got, problem, pass_, args, accuracy_of(outputs, dtype, stride=stride))
        threads(3)
        assert torch.equal(run(problem, tile(outputs, stride, pass_), pass_, args), got)
