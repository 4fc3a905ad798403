"""cpp.direct's forward and grad_input over the shapes at which its blocking changes, on every vector width.

csrc/algorithm/blocking.h decides which microkernel runs and how channels, voxels and the reduction are cut; lane
counts (2 to 16) are where it changes its mind. Each problem runs with the kernels of every instruction set of this
machine and, where that lacks AVX-512, with 64-byte vectors of AVX2 instructions, built here by the local compiler.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pyvolconv.backends.base import Backend, empty
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Pass

from .harness import EXTENSION, ISAS, KERNELS, MISSING, SANITIZER_FLAGS, WIDE, WIDE_FLAGS, compile_harness

CPP: Backend = next(backend for backend in REGISTRY if backend.name == "cpp.direct")
RESULT = {"forward": "output", "grad_input": "input", "grad_weight": "weight"}

CUT = (
    # Blocks of 1 to 3 vectors of channels, whole and partial, at 2 to 16 lanes; the planar kernel's 1 to 4 channels.
    *(f"n1ic5oc{channels}-i3x4x9-k3-p1-bias" for channels in (1, 2, 3, 4, 6, 7, 8, 9, 16, 17, 25, 33, 49, 65)),
    # Widths around whole vectors, at which the planar kernel ends a row with an overlapping or a short vector.
    *(f"n1ic3oc5-i2x3x{width}-k3-p1" for width in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 30, 33)),
    # Runs shorter and longer than the flat kernel's limit, with and without dilation.
    *(f"n1ic{channels}oc20-i3x4x6-k3-p1" for channels in (1, 4, 5, 6, 12, 40)),
    "n1ic7oc20-i3x5x9-k3-p2-d1x1x2",
    "n1ic24oc20-i3x5x9-k3-p2-d1x2x2",
    # Reductions of several parts and of several chunks of source channels, the last chunk smaller.
    "n1ic70oc66-i3x4x5-k3-p1-bias",
    "n2ic300oc20-i2x3x4-k3-p1-bias",
    "n1ic20oc300-i2x3x17-k3-p1",
    "n1ic1030oc4-i1x2x9-k1x3x3-p0x1x1",
    # Volumes of several tiles along each axis, the last of them smaller.
    "n1ic32oc8-i21x23x19-k3-p1-bias",
    "n1ic8oc16-i5x6x301-k3x3x5-p1x1x2",
    "n2ic16oc24-i15x15x30-k3-p1",
    # Separated packing: strides larger than the kernel, dilation larger than the tile.
    "n1ic6oc9-i9x11x37-k1x2x2-s3x3x4",
    "n1ic6oc9-i25x27x29-k2x3x3-p12x13x14-d11x12x13",
    "n1ic9oc6-i9x10x33-k3-s2-p1-bias",
    # Padding beyond the kernel's reach, on one side only; outputs that see padding alone.
    "n1ic3oc4-i2x3x4-k2-p5+0x0+6x7+3-bias",
    # Depthwise: one unit, several units, the last of them smaller; strides and dilation.
    *(f"n1g{groups}ic{groups}oc{groups}-i4x5x11-k3-p1-bias" for groups in (2, 7, 8, 31, 70, 130)),
    "n1g40ic40oc40-i7x8x9-k3x5x3-s2x1x3-p1x2x1-d1x1x2",
    # Depthwise on the tensors themselves (ndhwc, one vector of channels and more): rows of 1 to 8 voxels and their sum,
    # odd heights, kernels of 3 and 5 taps along the width with others along the height, blocks of rows, strides.
    *(f"n1g16ic16oc16-i3x5x{width}-k3-p1-bias" for width in (1, 2, 5, 6, 7, 8, 9, 13, 19)),
    "n2g37ic37oc37-i4x7x11-k3x2x5-p1x1x2-bias",
    "n1g16ic16oc16-i3x1x9-k1x5x3-p0x2x1",
    "n1g24ic24oc24-i6x40x21-k5-p2-d2x1x1",
    "n1g16ic16oc16-i9x7x10-k3-s3x2x1-p1",
    "n1g18ic18oc18-i7x9x10-k2x3x4-s2-p0x1x2-d1x2x1-bias",
    # One product on the tensors themselves (ndhwc): 1x1x1 with strides, touching windows, sizes they do not cover.
    *(f"n2ic19oc{channels}-i3x5x7-k1-bias" for channels in (1, 16, 40, 67)),
    "n1ic70oc33-i5x9x11-k1-s2x3x1-bias",
    "n2ic18oc21-i4x6x6-k2-s2-bias",
    "n1ic5oc33-i3x4x8-k1x2x4-s1x2x4",
    "n1ic8oc9-i5x6x7-k2-s2",
    # Groups of several channels; channel multipliers.
    "n2g3ic9oc51-i3x4x6-k3-p1-bias",
    "n1g6ic6oc18-i3x4x17-k3-p1",
)


def numbers(problem: ConvProblem) -> list[int]:
    """A problem as tests/cpp_harness.cpp reads it."""
    begin, end = zip(*problem.padding, strict=True)
    head = [problem.batch, problem.in_channels, problem.out_channels, problem.groups, int(problem.layout == "ndhwc")]
    sizes = (problem.input_size, problem.output_size, problem.kernel_size, problem.stride)
    return [*head, *itertools.chain(*sizes, begin, end, problem.dilation)]


Run = Callable[[ConvProblem, Pass, list[torch.Tensor]], torch.Tensor]


@pytest.fixture(scope="session")
def wide_library(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile 64-byte vectors with")
    target = tmp_path_factory.mktemp("wide") / "wide.so"
    compile_harness("cpp_harness.cpp", target, *WIDE_FLAGS)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=KERNELS)
def run(request, run_pass) -> Iterator[Run]:
    """run(problem, pass_, operands) with the kernels of one instruction set."""
    if EXTENSION is None:
        pytest.skip(MISSING)
    if request.param == WIDE:
        if "avx2" not in ISAS:
            pytest.skip("64-byte vectors are tested with AVX2 instructions, which this machine lacks")
        yield partial(run_wide, request.getfixturevalue("wide_library"))
        return
    before = EXTENSION.current_isa()
    EXTENSION.use_isa(request.param)
    yield partial(run_pass, CPP)
    EXTENSION.use_isa(before)


def run_wide(library: ctypes.CDLL, problem: ConvProblem, pass_: Pass, args: list[torch.Tensor]) -> torch.Tensor:
    result = empty(problem, RESULT[pass_], args[0])
    pointers = [ctypes.c_void_p(arg.data_ptr()) for arg in args] + [None] * (3 - len(args))
    torch.get_num_threads()
    library.run_pass(
        (ctypes.c_int64 * 26)(*numbers(problem)),
        int(problem.dtype == "float64"),
        PASSES.index(pass_),
        *pointers,
        ctypes.c_void_p(result.data_ptr()),
    )
    return result


@pytest.fixture(
    params=[
        f"cpu-{dtype}-{layout}-{text}"
        for text, layout, dtype in itertools.product(CUT, LAYOUTS, ("float32", "float64"))
    ]
)
def cut_problem(request) -> ConvProblem:
    return ConvProblem.parse(request.param)


def test_integers_are_exact(run, cut_problem, operands, reference, poisoned):
    for pass_ in PASSES:
        args = operands(cut_problem, pass_, integers=True)
        assert torch.equal(run(cut_problem, pass_, args).double(), reference(cut_problem, pass_, args)), pass_


def test_within_bound_and_same_bits_for_every_thread_count(run, cut_problem, operands, assert_within_bound, threads):
    for pass_ in ("forward", "grad_input"):
        args = operands(cut_problem, pass_)
        threads(1)
        once = run(cut_problem, pass_, args)
        assert_within_bound(once, cut_problem, pass_, args, CPP.accuracy(cut_problem, pass_))
        for count in (2, 3, 2):
            threads(count)
            assert torch.equal(run(cut_problem, pass_, args), once), f"{pass_}, {count} threads"


def test_scratch_of_a_larger_problem_does_not_leak(run, operands, reference):
    """Scratch memory is kept between calls: what a NaN problem left there must not reach the next result."""
    for layout in LAYOUTS:
        large = ConvProblem.parse(f"cpu-float32-{layout}-n2ic20oc24-i6x7x33-k3-p2")
        for pass_ in ("forward", "grad_input"):
            run(large, pass_, [arg.fill_(float("nan")) for arg in operands(large, pass_)])
            for text in ("n1ic3oc5-i4x5x6-k3-p1", "n1ic9oc5-i4x5x9-k3-p1", "n1g5ic5oc5-i4x5x9-k3-p1"):
                problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
                args = operands(problem, pass_, integers=True)
                assert torch.equal(run(problem, pass_, args).double(), reference(problem, pass_, args))


def test_a_nan_reaches_its_own_outputs_only(run, operands):
    """Padding and idle lanes are skipped or zero: one bad voxel must not spread beyond the kernel's reach."""
    texts = ("n1ic3oc5-i3x4x20-k3-p1", "n1g9ic9oc9-i3x4x20-k3-p1", "n1g18ic18oc18-i3x4x20-k3-p1")
    for layout, text in itertools.product(LAYOUTS, texts):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
        x, weight = operands(problem, "forward")
        x[0, 1, 1, 1, 9] = float("nan")
        hit = run(problem, "forward", [x, weight]).isnan()
        channels = slice(None) if problem.groups == 1 else slice(1, 2)
        assert hit[0, channels, 0:3, 0:3, 8:11].all()
        assert hit.sum() == hit[0, channels, 0:3, 0:3, 8:11].numel()


def test_results_larger_than_caches(run, operands, reference, poisoned):
    """Whole lines of an ndhwc result go past the caches: from 64 MiB on, depthwise from 32 MiB on with its source."""
    shapes = (
        ("forward", "n1ic1oc16-i65x130x130-k1x1x2-p0x0x1+0-bias"),
        ("grad_input", "n1ic16oc1-i65x130x130-k1x2x1"),
        ("forward", "n1ic1oc16-i65x130x130-k1-bias"),
        ("grad_input", "n1ic16oc1-i65x130x130-k1x2x2-s1x2x2"),
        ("forward", "n1g16ic16oc16-i40x80x90-k1x3x3-p0x1x1-bias"),
        ("forward", "n1g16ic16oc16-i40x80x90-k1x2x1"),
        ("forward", "n3g54ic54oc54-i9x40x79-k3-p1-bias"),  # vectors that are not lines
        ("grad_input", "n1g18ic18oc18-i30x95x90-k3x5x5-p1x2x2"),
        ("grad_input", "n1g18ic18oc18-i30x95x90-k3-s1x1x2-p1"),  # rows that are not one run
    )
    for pass_, text in shapes:
        problem = ConvProblem.parse(f"cpu-float32-ndhwc-{text}")
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, pass_, args).double(), reference(problem, pass_, args)), pass_


def test_weights_larger_than_caches(run, operands, reference, threads):
    """Tiles are as large as a core's cache allows then, and each asks for the weights that follow."""
    texts = ("n8ic288oc96-i2x7x7-k3-p1", "n1ic1100oc520-i3x5x19-k1", "n3ic130oc257-i9x10x11-k3x1x3-p1x0x1-bias")
    for text, dtype, layout in itertools.product(texts, ("float32", "float64"), LAYOUTS):
        problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
        for pass_ in ("forward", "grad_input"):
            args = operands(problem, pass_, integers=True)
            exact = reference(problem, pass_, args)
            for count in (1, 3):
                threads(count)
                assert torch.equal(run(problem, pass_, args).double(), exact), (text, dtype, layout, pass_, count)


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
    bias=st.booleans(),
)
def test_any_problem_is_exact_on_integers(
    batch, groups, channels, size, kernel, stride, padding, dilation, dtype, layout, bias, operands, run, reference
):
    for axis in range(3):
        reach = (kernel[axis] - 1) * dilation[axis]
        assume(size[axis] + sum(padding[axis]) > reach)
    in_channels, out_channels = (count * groups for count in channels)
    problem = ConvProblem(
        batch, in_channels, out_channels, size, kernel, stride, padding, dilation, groups, dtype, layout, bias=bias
    )
    for pass_ in ("forward", "grad_input"):
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, pass_, args).double(), reference(problem, pass_, args)), pass_


@pytest.mark.slow
@pytest.mark.sanitizer
@pytest.mark.parametrize("flags", [[], ["-mavx2", "-mfma"]], ids=["sse2", "avx2"])
def test_no_access_outside_of_buffers(flags, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build with a sanitizer")
    if flags and "avx2" not in ISAS:
        pytest.skip("this machine lacks AVX2")
    program = tmp_path / "harness"
    compile_harness("cpp_harness.cpp", program, *SANITIZER_FLAGS, *flags)
    problems = [ConvProblem.parse(f"cpu-float32-{layout}-{text}") for text in CUT for layout in LAYOUTS]
    text = "\n".join(" ".join(map(str, numbers(problem))) for problem in problems)
    ran = subprocess.run([str(program)], input=text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:4000]
    assert ran.stdout == f"{len(problems)} problems\n"
