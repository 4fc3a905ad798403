"""The input gradient of cpp.first_layer: numbers of columns, vectors of a row, rows of a task, depths in a ring. Every
instruction set; `test_backends` has the rest."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.cpp import load_extension
from pyvolconv.backends.cpp_first_layer import CppFirstLayer
from pyvolconv.problem import LAYOUTS, ConvProblem

_C, missing = load_extension()
pytestmark = pytest.mark.skipif(_C is None, reason=missing or "compiled")

BACKEND = CppFirstLayer()
SHAPES = (
    "n2ic1oc16-i9x10x11-k3-p1",
    "n1ic1oc1-i1x1x1-k3-p1",
    "n1ic3oc20-i5x7x70-k3-p2x0x1",  # blocks of three vectors and a rest
    "n2ic4oc5-i4x5x6-k3-p1+0x1x3+2",
    "n1ic3oc17-i2x3x4-k3-p4",  # rows that meet nothing but padding
    "n1ic3oc9-i9x10x60-k7-s2-p3",  # columns in two groups
    "n1ic4oc6-i6x9x40-k2x3x5-s3x2x4-p1x0x2",  # strides beside windows: voxels that no window covers
    "n1ic2oc3-i11x8x9-k3-s1x2x1-p2-d2x3x1",  # a ring with depths in between
    "n2ic3oc4-i8-k2-s2",
    "n1ic1oc7-i5x6x130-k1x1x2",
    "n3ic2oc33-i1x1x5-k1",
    "n1ic4oc2-i3x4x33-k1x1x11-p0x0x5",
    "n1ic1oc512-i6x31x20-k3-p1",  # few rows fit into the cache
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_bound_and_same_bits(
    shape, dtype, layout, isa, operands, reference, assert_within_bound, threads, poisoned
):
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{shape}")
    args = operands(problem, "grad_input", integers=True)
    threads(1)
    assert torch.equal(BACKEND.grad_input(problem, *args).double(), reference(problem, "grad_input", args))
    args = operands(problem, "grad_input")
    got = BACKEND.grad_input(problem, *args)
    assert_within_bound(got, problem, "grad_input", args, BACKEND.accuracy(problem, "grad_input"))
    for count in (2, 3):
        threads(count)
        assert torch.equal(BACKEND.grad_input(problem, *args), got), f"other bits with {count} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinities_reach_the_voxels_of_their_windows_alone(isa, layout):
    problem = ConvProblem.parse(f"cpu-float32-{layout}-n1ic2oc3-i6x7x40-k3-p1")
    grad_output, weight = torch.ones(problem.output_shape), torch.ones(problem.weight_shape)
    grad_output[0, 1, 2, 3, 20] = torch.inf
    memory_format = torch.channels_last_3d if layout == "ndhwc" else torch.contiguous_format
    got = BACKEND.grad_input(
        problem, grad_output.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
    )
    inside = torch.zeros(problem.input_shape, dtype=torch.bool)
    inside[:, :, 1:4, 2:5, 19:22] = True
    assert bool((got[inside] == torch.inf).all())
    assert bool(got[~inside].isfinite().all())


def test_infinite_weights_do_not_meet_padding(isa):
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic1oc2-i4x4x4-k3-p1")
    weight = torch.full(problem.weight_shape, torch.inf)
    assert bool((BACKEND.grad_input(problem, torch.ones(problem.output_shape), weight) == torch.inf).all())
