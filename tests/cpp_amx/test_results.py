"""`cpp.amx`: products of bfloat16 parts of float32 values, on the processor's matrix unit and on one in plain C++."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.base import operand_shapes
from pyvolconv.backends.cpp import kernels
from pyvolconv.problem import LAYOUTS, ConvProblem

from ..conftest import between_guards
from .units import CELLS, DIRECT, NOT_SPLIT, TINY, WITH, integers, same_bits, unit_of


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
