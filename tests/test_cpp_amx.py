"""`cpp.amx`: products of bfloat16 parts of float32 values, on the processor's matrix unit and on one in plain C++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyvolconv
from pyvolconv.backends.base import MEMORY_FORMAT, operand_shapes
from pyvolconv.backends.cpp import CppDirect, kernels, load_extension
from pyvolconv.backends.cpp_amx import CppAmx
from pyvolconv.dispatch import choose, forget_choices, set_precision
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

from .conftest import between_guards

WITH = PASSES
"""The passes that the backend has."""

DIRECT = CppDirect()
TINY = torch.finfo(torch.float32).tiny

SMALL = (
    "n2ic5oc7-i3x4x5-k3x2x3-s2x1x2-p1x1x0-bias",  # an odd channel, residues of the stride
    "n1ic18oc33-i2x3x6-k3-p1-bias",  # one more than a tile of rows, and than a block of columns
    "n1ic3oc4-i3x2x17-k1x2x3-p0x1x2-d1x2x2",  # taps apart from one another
    "n2ic34oc17-i2x3x2-k1-bias",  # one row of height and width
    "n1ic1oc1-i4-k3-p2",
    "n3ic7oc5-i1-k3-p1-bias",  # one voxel
    "n1ic2oc3-i5x6x1-k3x3x1-p1x1x0",  # rows of one voxel
    "n1ic3oc4-i2x3x4-k2-p5+0x0+4x2+3-bias",  # padding wider than the kernel: windows of nothing else
    "n2ic3oc5-i5x4x6-k1-s2",  # most voxels meet no tap
    "n1ic2oc3-i5x6x7-k1x2x2-s3x3x4",  # strides larger than the kernel
)
"""For both units: the plain one is slow."""

LARGER = (
    "n2ic64oc64-i4x7x9-k3-p1-bias",
    "n1ic3oc50-i6x7x40-k3-p1-d2x1x2-bias",
    "n2ic33oc18-i9-k2-s2",  # a voxel that no window covers
    "n2ic20oc17-i5x6x40-k1x3x3-s1x3x3",
    "n1ic6oc9-i9x8x21-k2x3x3-p2x4x9-d5x4x9",  # dilation wider than a tile
    "n1ic3oc5-i9x9x13-k2x3x3-s4x2x3-p1x2x3-d2x4x3",  # residues without taps
    "n2ic8oc40-i13x14x15-k3-p1-bias",  # tiles along each axis, the last of them smaller
    "n1ic18oc5-i3x8x27-k3-s3x2x4-p0+1x0x0-d1x2x3",  # residues whose three taps are neighbours: transformed
    "n2ic6oc4-i9x10x9-k5x6x3-s2x2x1-p2x2x1",
    "n1ic7oc5-i11x14x9-k4x8x3-s2x3x1-p1x0x0",
    "n1ic3oc5-i7x9x6-k3-p1",  # an odd number of rows in tiles of two
    "n1ic4oc3-i1x2x700-k1x1x5-p0x0x2",
    "n1ic3100oc3-i4x5x6-k3-p1-bias",  # chunks of source channels, the last of them shorter
    "n1ic3oc3100-i4x5x6-k3-p1",
)

CELLS = [("own", text) for text in SMALL + LARGER] + [("plain", text) for text in SMALL]

NOT_SPLIT = {
    "infinity": 0x7F800000,
    "minus infinity": 0xFF800000,
    "NaN": 0x7FC00000,
    "NaN whose only bit bfloat16 does not have": 0x7F800001,
    "NaN of ones, which rounds to a zero": 0xFFFFFFFF,
    "rounds to infinity": 0x7F7F8000,
    "largest": 0x7F7FFFFF,
}
"""Bits of values that are no sum of bfloat16 ones."""


def unit_of(name: str) -> CppAmx:
    """The backend on the processor's own unit, or on the plain one; skips where it cannot run."""
    _, missing = load_extension()
    if missing:
        pytest.skip(missing)
    if kernels().current_isa() != "avx512":
        pytest.skip(f"parts are made with AVX-512; this processor has {kernels().current_isa()}")
    if name == "own" and not kernels().has_matrix_unit():
        pytest.skip("this processor has no AMX, or the system does not allow its use")
    backend = CppAmx()
    backend.plain = name == "plain"
    return backend


@pytest.fixture(params=["own", "plain"])
def unit(request):
    return unit_of(request.param)


@pytest.fixture
def own():
    return unit_of("own")


@pytest.fixture(params=WITH)
def each_pass(request):
    return request.param


@pytest.fixture
def split_into():
    """split_into(count): settings of the user that make it `count` parts; undone at the end."""
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision

    def choose_settings(count: int) -> None:
        set_precision("high" if count == 2 else "default")
        conv.fp32_precision = "bf16" if count == 1 else before

    yield choose_settings
    set_precision("default")
    conv.fp32_precision = before


@pytest.fixture(params=[3, 2, 1])
def parts(request, split_into):
    split_into(request.param)
    return request.param


def integers(shape: tuple[int, ...], largest: int, layout: str) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape).float().contiguous(memory_format=MEMORY_FORMAT[layout])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "text"), CELLS)
def test_bound_and_integers(
    name, text, layout, parts, operands, run_pass, reference, assert_within_bound, threads, poisoned
):
    """Small integers are one part each. The same bits for every run and thread count, and from both units."""
    backend = unit_of(name)
    problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
    for pass_ in WITH:
        args = operands(problem, pass_, integers=True)
        threads(1)
        assert torch.equal(run_pass(backend, problem, pass_, args).double(), reference(problem, pass_, args))
        args = operands(problem, pass_)
        got = run_pass(backend, problem, pass_, args)
        assert_within_bound(got, problem, pass_, args, backend.accuracy(problem, pass_))
        for count in (2, 3) if name == "own" else (2,):
            threads(count)
            assert same_bits(run_pass(backend, problem, pass_, args), got), f"other bits with {count} threads"
        if name == "plain" and kernels().has_matrix_unit():
            assert same_bits(run_pass(unit_of("own"), problem, pass_, args), got), "the units differ"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("count", "largest"), [(3, (2**18, 1)), (3, (1, 2**18)), (3, (2**9, 2**9)), (2, (2**13, 2))])
def test_large_integers_are_exact(count, largest, layout, unit, each_pass, split_into, run_pass, reference):
    """Of three parts, of two times two, and of two times one, with sums up to 2**23."""
    split_into(count)
    problem = ConvProblem.parse(f"cpu-float32-{layout}-n1ic5oc4-i3x4x5-k2x1x3-p1")
    shapes = operand_shapes(problem, each_pass)
    args = [between_guards(integers(shape, most, layout)) for shape, most in zip(shapes, largest, strict=True)]
    got = run_pass(unit, problem, each_pass, args)
    assert torch.equal(got.double(), reference(problem, each_pass, args))


def test_three_parts_are_the_whole_value(unit):
    """Every bit of a value counts: times one, x is the result, in forward and in grad_input."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc1-i1x1x900-k1")
    x = torch.randn(900).mul_(2.0 ** torch.randint(-80, 120, (900,))).view(problem.input_shape)
    one = torch.ones(problem.weight_shape)
    assert torch.equal(unit.forward(problem, x, one, None), x)
    assert torch.equal(unit.grad_input(problem, x, one), x)


@pytest.mark.parametrize("count", [3, 2, 1])
def test_bound_where_rounding_is_worst(count, unit, split_into, assert_within_bound):
    """Values whose second and third parts are as large as they can be, all of one sign."""
    split_into(count)
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic40oc3-i1x1x9-k1")
    step = 2.0**-23
    # Rests of half a step of bfloat16, less as much as keeps the second part's rest at its half.
    for rest in (2.0**-8 - step, 2.0**-8 - 2.0**-16 + 2.0**-17 - step, 2.0**-8 - 2.0**-17, 2.0**-8, -(2.0**-9) + step):
        args = [torch.full(shape, 1 + rest) for shape in operand_shapes(problem, "forward")]
        got = unit.forward(problem, *args, None)
        assert_within_bound(got, problem, "forward", args, unit.accuracy(problem, "forward"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bits", NOT_SPLIT.values(), ids=NOT_SPLIT)
def test_what_cannot_be_split_is_left_to_direct(bits, which, layout, parts, unit, each_pass, operands, run_pass):
    """One such value, of the last sample: the result is that of cpp.direct to the bit, also that of other samples."""
    kernel = "k2x3x2" if layout == "ndhwc" else "k2"  # with a transform and without
    problem = ConvProblem.parse(f"cpu-float32-{layout}-n3ic5oc6-i2x4x4-{kernel}-p1-bias")
    args = operands(problem, each_pass)
    args[which][-1, -1, -1, -1, -1] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert same_bits(run_pass(unit, problem, each_pass, args), run_pass(DIRECT, problem, each_pass, args))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("text", ["n1ic3100oc3-i4x5x6-k3-p1", "n1ic3oc3100-i4x5x6-k3-p1"])
def test_what_cannot_be_split_in_the_last_chunk(text, which, own, each_pass, operands, run_pass):
    problem = ConvProblem.parse(f"cpu-float32-ncdhw-{text}")
    args = operands(problem, each_pass)
    args[which][-1, -1, -1, -1, -1] = torch.nan
    assert same_bits(run_pass(own, problem, each_pass, args), run_pass(DIRECT, problem, each_pass, args))


def test_largest_value_that_is_split(unit, parts, assert_within_bound):
    """It is not left to others, and its first part is bfloat16's largest number."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic2oc1-i1x1x2-k1")
    largest = torch.tensor(0x7F7F7FFF, dtype=torch.int32).view(torch.float32).item()
    x = torch.tensor([largest, 2.0**100 / 3, -largest, 2.0**100 / 3]).view(1, 2, 1, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.tensor([2.0**-20, 1.0]).view(problem.weight_shape)
    got = unit.forward(problem, x, weight, None)
    assert_within_bound(got, problem, "forward", [x, weight], unit.accuracy(problem, "forward"))


@pytest.mark.parametrize("scales", [(-126, 0), (-120, 20), (-115, 15), (-70, -70), (-60, -66), (-149, 100), (20, -140)])
def test_parts_below_the_normal_numbers_count_as_zero(scales, unit, each_pass, operands, run_pass, reference):
    """An operand counts for up to 2**-126 less of itself, and each sum may lose as much."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic6oc5-i2x3x4-k2-p1")
    args = [arg.mul_(2.0**scale) for arg, scale in zip(operands(problem, each_pass), scales, strict=True)]
    got = run_pass(unit, problem, each_pass, args)
    absolute = [arg.abs() for arg in args]
    ones = [torch.ones_like(arg) for arg in args]
    count = reference(problem, each_pass, ones)
    lost = reference(problem, each_pass, [absolute[0], ones[1]]) + reference(problem, each_pass, [ones[0], absolute[1]])
    accuracy = unit.accuracy(problem, each_pass)
    bound = accuracy.constant * 2.0**-23 * problem.reduction_length(each_pass) * reference(problem, each_pass, absolute)
    bound += TINY * (1.01 * lost + 18 * count)  # six products, each added and in two further sums
    assert bool(((got.double() - reference(problem, each_pass, args)).abs() <= bound).all())


def test_numbers_below_the_normal_ones(unit):
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic2oc1-i1-k1")
    x = torch.tensor([TINY / 2, 2.0]).view(problem.input_shape)
    weight = torch.tensor([2.0**40, 1.0]).view(problem.weight_shape)
    assert unit.forward(problem, x, weight, None).item() == 2.0
    assert unit.forward(problem, torch.full_like(x, 2.0**-70), torch.full_like(weight, 2.0**-70), None).item() == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scratch_of_a_larger_problem_does_not_leak(layout, unit, each_pass, parts, operands, run_pass, reference):
    """What a problem of NaN left in scratch memory must not reach the next result."""
    for dirty in ("n2ic20oc36-i3x4x9-k2-p1", "n1ic3oc3-i2x2x40-k3-p1"):
        large = ConvProblem.parse(f"cpu-float32-{layout}-{dirty}")
        for text in ("n1ic3oc5-i3x4x5-k3-p1", "n2ic9oc17-i2x3x4-k1x2x2-s1x2x1", "n1ic1oc1-i1x1x7-k1x1x5-p0x0x2"):
            run_pass(unit, large, each_pass, [arg.fill_(float("nan")) for arg in operands(large, each_pass)])
            problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
            args = operands(problem, each_pass, integers=True)
            got = run_pass(unit, problem, each_pass, args)
            assert torch.equal(got.double(), reference(problem, each_pass, args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scratch_behind_a_task_of_fewer_samples(layout, own, operands, run_pass, threads):
    """Tasks of three samples and then of two: some of many threads get nothing but the latter."""
    threads(40)
    dirty = ConvProblem.parse(f"cpu-float32-{layout}-n80ic64oc64-i6-k3-p1")
    problem = ConvProblem.parse(f"cpu-float32-{layout}-n5ic33oc3100-i6-k3-p1")
    nans = [arg.fill_(float("nan")) for arg in operands(dirty, "forward")]
    for _ in range(3):  # in all threads
        run_pass(own, dirty, "forward", nans)
    args = operands(problem, "forward", integers=True)
    assert torch.equal(run_pass(own, problem, "forward", args), run_pass(DIRECT, problem, "forward", args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("n5ic340oc360-i2x3x3-k3-p1", 1),  # all samples in one task
        ("n5ic1030oc1032-i5x6x7-k1", 3),  # three samples in one, two in the next
        ("n1ic1030oc1032-i5x15x16-k1", 3),  # many voxels, tasks of few target channels
    ],
)
def test_weights_larger_than_a_cache(text, count, layout, own, each_pass, split_into, operands, run_pass):
    split_into(count)
    problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
    args = operands(problem, each_pass, integers=True)
    assert torch.equal(run_pass(own, problem, each_pass, args), run_pass(DIRECT, problem, each_pass, args))


def test_says_why_it_cannot_run(own, use_isa):
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic16oc16-i8-k3-p1")
    assert own.unsupported_reasons(problem, "forward") == []
    for other, why in (
        (problem.with_(dtype="float64"), "dtype is float64"),
        (problem.with_(dtype="bfloat16"), "dtype is bfloat16"),
        (problem.with_(groups=2), "2 groups"),
        (problem.with_(device="cuda"), "device is cuda"),
    ):
        (reason,) = own.unsupported_reasons(other, "forward")
        assert why in reason
    for isa in ("avx2", "baseline"):  # what PYVOLCONV_ISA caps
        use_isa(isa)
        forget_choices()
        (reason,) = own.unsupported_reasons(problem, "forward")
        assert f"instruction set {isa}" in reason
        assert "AMX" in reason
        assert choose(problem, "forward").name != own.name
        with pytest.raises(ValueError, match="AVX-512"):
            own.forward(problem, torch.ones(problem.input_shape), torch.ones(problem.weight_shape), None)


def test_choice_depends_on_settings_alone(own, split_into):
    """Not on what ran before, on the thread that asks, or on torch's modes; a setting counts from the next call on."""
    problems = [
        ConvProblem.parse(f"cpu-float32-{layout}-{text}")
        for layout in LAYOUTS
        for text in ("n2ic64oc64-i16-k3-p1", "n1ic16oc32-i24-k3-p1", "n4ic512oc512-i7-k1", "n1ic1oc8-i12-k5")
    ]

    def chosen():
        return [choose(problem, pass_).name for problem in problems for pass_ in PASSES]

    found = {}
    for count in (3, 2, 1, 3, 1, 2, 3):
        split_into(count)
        names = chosen()
        assert found.setdefault(count, names) == names
        forget_choices()
        assert chosen() == names
        own.forward(problems[1], torch.randn(problems[1].input_shape), torch.randn(problems[1].weight_shape), None)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert chosen() == names
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(chosen).result() == names
    assert own.name in found[3]


TORCH = {
    "convolution": lambda: torch.nn.functional.conv3d(
        torch.linspace(-1, 1, 2 * 64 * 6**3).bfloat16().view(2, 64, 6, 6, 6),
        torch.linspace(-1, 1, 48 * 64 * 27).bfloat16().view(48, 64, 3, 3, 3),
    ),
    "product": lambda: (
        torch.linspace(-1, 1, 96 * 200).bfloat16().view(96, 200)
        @ torch.linspace(-1, 1, 200 * 80).bfloat16().view(200, 80)
    ),
    "odd product": lambda: (
        torch.linspace(-1, 1, 5 * 70).bfloat16().view(5, 70) @ torch.linspace(-1, 1, 70 * 19).bfloat16().view(70, 19)
    ),
}


TILES = """
#include <stdint.h>
#include <string.h>
typedef struct { uint8_t bytes[64]; } Configuration;
static uint8_t values[1024];
void configure(int rows) {
    Configuration wanted = {{1}};
    wanted.bytes[16] = 64;
    wanted.bytes[48] = (uint8_t)rows;
    __asm__ volatile("ldtilecfg %0" : : "m"(wanted));
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(values), "r"((int64_t)64) : "memory");
}
void release(void) { __asm__ volatile("tilerelease"); }
int configured_rows(void) {
    Configuration found;
    memset(&found, 0, sizeof(found));
    __asm__ volatile("sttilecfg %0" : "=m"(found));
    return found.bytes[0] == 0 ? 0 : found.bytes[48];
}
"""
"""What a library does that uses the unit, and remembers how it configured the tiles of a thread."""


def test_tiles_are_left_as_they_were(own, each_pass, operands, run_pass, threads, tmp_path):
    """oneDNN's convolutions and products release theirs at the end; others may not."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile a user of the unit with")
    source, library = tmp_path / "tiles.c", tmp_path / "tiles.so"
    source.write_text(TILES)
    built = subprocess.run(["gcc", "-O1", "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    tiles = ctypes.CDLL(str(library))
    threads(1)
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic20oc40-i4x5x6-k3-p1")
    args = operands(problem, each_pass)
    tiles.release()
    expected = run_pass(own, problem, each_pass, args)
    assert tiles.configured_rows() == 0, "a thread that used no tiles has some"
    tiles.configure(5)
    try:
        assert tiles.configured_rows() == 5
        assert torch.equal(run_pass(own, problem, each_pass, args), expected)
        assert tiles.configured_rows() == 5, "other tiles than before"
    finally:
        tiles.release()


@pytest.mark.parametrize("count", [1, 2])
def test_kernels_of_torch_that_use_the_unit_stay_right(count, own, each_pass, operands, run_pass, threads):
    """Tiles are state of a thread, of which oneDNN keeps account: ours before, between and after its kernels."""
    threads(count)
    problem = ConvProblem.parse("cpu-float32-ndhwc-n2ic40oc50-i6x7x8-k3-p1")
    args = operands(problem, each_pass)
    with ThreadPoolExecutor(1) as pool:  # a thread in which neither ran before
        ours = pool.submit(run_pass, own, problem, each_pass, args).result()
    theirs = {name: run() for name, run in TORCH.items()}

    def alternate():
        for first in TORCH:
            for second in TORCH:
                for name in (first, second):
                    assert torch.equal(TORCH[name](), theirs[name]), f"{name} after cpp.amx"
                    assert torch.equal(run_pass(own, problem, each_pass, args), ours), f"cpp.amx after {name}"
                    assert torch.equal(TORCH[name](), theirs[name]), f"{name} after cpp.amx"

    alternate()
    threads_at_once = 3
    with ThreadPoolExecutor(threads_at_once) as pool:
        for done in [pool.submit(alternate) for _ in range(threads_at_once)]:
            done.result()


def test_several_python_threads_at_once(own, operands, run_pass, threads):
    threads(2)
    texts = ("n2ic16oc24-i6x9x10-k3-p1", "n2ic6oc10-i8x9x11-k3-s2-p1")
    cases = []
    for text in texts:
        for layout in LAYOUTS:
            problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
            cases += [(problem, pass_, operands(problem, pass_)) for pass_ in WITH]
    alone = [run_pass(own, *case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for expected, several in zip(
            alone, pool.map(lambda case: [run_pass(own, *case) for _ in range(8)], cases), strict=True
        ):
            assert all(torch.equal(got, expected) for got in several)


FORK = """
    import os, signal, sys
    import torch
    from pyvolconv.backends.cpp_amx import CppAmx
    from pyvolconv.problem import ConvProblem

    problem = ConvProblem.parse("cpu-float32-ndhwc-n2ic16oc24-i6x7x12-k3-p1")
    x = torch.randn(problem.input_shape).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(problem.weight_shape).contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn(problem.output_shape).contiguous(memory_format=torch.channels_last_3d)
    run = {
        "forward": lambda backend: backend.forward(problem, x, weight, None),
        "grad_input": lambda backend: backend.grad_input(problem, grad, weight),
        "grad_weight": lambda backend: backend.grad_weight(problem, grad, x),
    }

    def passes():
        return [run[name](CppAmx()) for name in sys.argv[1:]]

    torch.set_num_threads(2)
    before = passes()
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # Ends a child that hangs, which the time limit of its parent would leave behind.
        status = 1
        try:
            same = [a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(before, passes())]
            status = 0 if all(same) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), all(torch.equal(a, b) for a, b in zip(before, passes())))
"""


def test_forked_child_computes_the_same_bits(own):
    command = [sys.executable, "-c", textwrap.dedent(FORK), *WITH]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.stdout.split() == ["0", "True"], result.stderr


def test_through_the_operators(own):
    """Derivatives of both orders that need the passes it has, inference mode, autocast."""
    x, weight = torch.randn(2, 5, 4, 6, 7, requires_grad=True), torch.randn(6, 5, 3, 2, 3)
    options = (None, (2, 1, 1), (1, 0, 2))
    with pyvolconv.use_backend(own.name):
        y = pyvolconv.conv3d(x, weight, *options)
        grad = torch.randn_like(y, requires_grad=True)
        (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
        direction = torch.randn_like(first)
        (second,) = torch.autograd.grad(first, grad, direction)
        with torch.inference_mode():
            assert torch.equal(pyvolconv.conv3d(x, weight, *options), y)
            assert pyvolconv.conv3d(x[:0], weight, *options).shape == (0, *y.shape[1:])
    expected = torch.nn.functional.conv3d(x, weight, *options)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(first, torch.autograd.grad(expected, x, grad)[0])
    torch.testing.assert_close(second, torch.nn.functional.conv3d(direction, weight, *options))
    with torch.autocast("cpu", torch.bfloat16):
        assert pyvolconv.conv3d(x, weight, *options).dtype == torch.bfloat16
