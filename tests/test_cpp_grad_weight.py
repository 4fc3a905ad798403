"""The weight gradient of cpp.direct over the shapes at which its plan changes.

The plan (csrc/algorithm/direct_grad_weight_plan.h) chooses what the lanes of a vector run over, cuts channels into
chunks, the volume into slabs and runs, and the sum into splits. Lane counts are 2 to 16, so channel counts and widths
around those are where it changes its mind; the larger problems here have several slabs, splits and chunks.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pyvolconv.backends.base import Backend
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.problem import LAYOUTS, ConvProblem

CPP: Backend = next(backend for backend in REGISTRY if backend.name == "cpp.direct")
PASS = "grad_weight"

CUT = (
    # Lanes over input channels: whole blocks, a partial block, kernel width and channels as one flat axis.
    "n3ic16oc24-i15x15x30-k3-p1",
    "n2ic20oc9-i6x7x33-k3-p1",
    "n2ic3oc40-i5x6x7-k3x3x5-p1x1x2",
    "n1ic6oc13-i5x6x7-k3-s1x2x3-p1",
    # Lanes over output channels: few input channels, whole and partial blocks of outputs.
    "n2ic1oc16-i9x20x40-k3-p1",
    "n2ic3oc64-i6x16x16-k3-s2-p1",
    "n1ic1oc17-i6x7x5-k3-p1",
    "n1ic2oc40-i5x9x11-k3-p2-d2",
    # Lanes along the width: widths at, below and above whole vectors, dilated taps.
    *(f"n2ic1oc7-i3x4x{width}-k3-p1" for width in (3, 4, 7, 8, 9, 15, 16, 17, 31, 33)),
    "n1ic2oc5-i3x8x40-k3x3x5-p1x1x4-d1x1x2",
    # Depthwise: whole and partial vectors of channels, channel multipliers, strides.
    "n2g32ic32oc32-i6x7x18-k3-p1",
    "n2g54ic54oc54-i4x6x7-k3-p1",
    "n1g7ic7oc21-i4x6x5-k3-p1",
    "n1g12ic12oc24-i5x9x9-k3-s2-p1",
    # Depthwise on the tensors themselves (ndhwc): rows of 1 to 8 voxels and their sum, odd heights, tasks over planes.
    *(f"n1g16ic16oc16-i3x5x{width}-k3-p1" for width in (1, 2, 5, 6, 7, 8, 9, 13, 19)),
    "n2g37ic37oc37-i4x7x11-k3x2x5-p1x1x2",
    "n1g24ic24oc24-i13x40x21-k5-p2-d2x1x1",
    # One tap: chunks of more channels.
    "n2ic300oc70-i3x4x5-k1",
    # Groups with several channels, more groups than one task takes.
    "n2g16ic64oc64-i4x6x10-k3-p1",
    "n1g40ic80oc120-i3x4x5-k3x1x3-p1x0x1",
    # Channels cut into chunks, the last of them smaller.
    "n1ic130oc67-i3x5x6-k3-p1",
    "n1ic72oc150-i4x4x4-k1x3x3-p0x1x1",
    "n1g2ic140oc140-i2x3x4-k3x2x1-p1x1x0",
    # Slabs cut along depth, height and width, the last of them smaller; windows far larger than the slab.
    "n1ic48oc8-i19x21x23-k3-p1",
    "n1ic64oc8-i2x3x203-k3x3x7-p1x1x3",
    "n1ic8oc16-i13x14x50-k2x3x3-s3x2x1-p1-d5x3x4",
    "n1ic4oc4-i2x2x1500-k1x1x3-p0x0x1",
    # Dilations wider than a slab and strides larger than the kernel: x is packed tap by tap.
    "n1ic8oc16-i70x60x90-k3x2x3-s2x3x3-d30x29x40",
    "n1ic1oc7-i5x6x60-k1x1x2-s3x2x3-p0x0x1",
    "n1ic3oc5-i20x6x40-k2-s1x1x2-p3-d17x3x25",
    "n2ic12oc9-i7x8x9-k1-s3",
)  # fmt: skip


@pytest.fixture(
    params=[
        f"cpu-{dtype}-{layout}-{text}"
        for text, layout, dtype in itertools.product(CUT, LAYOUTS, ("float32", "float64"))
    ]
)
def cut_problem(request) -> ConvProblem:
    problem = ConvProblem.parse(request.param)
    reasons = CPP.unsupported_reasons(problem, PASS)
    if reasons:
        pytest.skip("; ".join(reasons))
    return problem


def test_integers_are_exact(cut_problem, operands, run_pass, reference, poisoned):
    args = operands(cut_problem, PASS, integers=True)
    assert torch.equal(run_pass(CPP, cut_problem, PASS, args).double(), reference(cut_problem, PASS, args))


def test_within_bound_and_same_bits_for_every_thread_count(
    cut_problem, operands, run_pass, assert_within_bound, threads, poisoned
):
    args = operands(cut_problem, PASS)
    threads(1)
    once = run_pass(CPP, cut_problem, PASS, args)
    assert_within_bound(once, cut_problem, PASS, args, CPP.accuracy(cut_problem, PASS))
    for count in (2, 3, 2):
        threads(count)
        assert torch.equal(run_pass(CPP, cut_problem, PASS, args), once), f"{count} threads"


def test_scratch_of_a_larger_problem_does_not_leak(operands, run_pass, reference):
    """Scratch memory is kept between calls: what a NaN problem left there must not reach the next result."""
    for layout in LAYOUTS:
        large = ConvProblem.parse(f"cpu-float32-{layout}-n2ic20oc24-i6x7x33-k3-p2")
        run_pass(CPP, large, PASS, [arg.fill_(float("nan")) for arg in operands(large, PASS)])
        for text in ("n1ic3oc5-i4x5x6-k3-p1", "n1ic9oc5-i4x5x6-k3-p1", "n1g5ic5oc5-i4x5x9-k3-p1"):
            problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
            args = operands(problem, PASS, integers=True)
            assert torch.equal(run_pass(CPP, problem, PASS, args).double(), reference(problem, PASS, args))


axis_size = st.integers(1, 19)
small = st.integers(1, 3)


@given(
    batch=small,
    groups=st.sampled_from((1, 1, 2, 5)),
    channels=st.tuples(st.integers(1, 26), st.integers(1, 26)),
    size=st.tuples(axis_size, axis_size, axis_size),
    kernel=st.tuples(small, st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(small, small, small),
    padding=st.tuples(*(st.tuples(st.integers(0, 3), st.integers(0, 3)) for _ in range(3))),
    dilation=st.tuples(small, small, small),
    dtype=st.sampled_from(("float32", "float64")),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_problem_is_exact_on_integers(
    batch, groups, channels, size, kernel, stride, padding, dilation, dtype, layout, operands, run_pass, reference
):
    for axis in range(3):
        reach = (kernel[axis] - 1) * dilation[axis]
        assume(size[axis] + sum(padding[axis]) > reach)
    in_channels, out_channels = (count * groups for count in channels)
    problem = ConvProblem(
        batch, in_channels, out_channels, size, kernel, stride, padding, dilation, groups, dtype, layout
    )
    args = operands(problem, PASS, integers=True)
    assert torch.equal(run_pass(CPP, problem, PASS, args).double(), reference(problem, PASS, args))
