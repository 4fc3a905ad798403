"""`cpp.amx` on float16 and bfloat16 tensors, on the processor's matrix unit and on one in plain C++."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.base import operand_shapes
from pyvolconv.backends.cpp import kernels, plan_of
from pyvolconv.backends.cpp_amx import PARTS
from pyvolconv.backends.cpp_widened import CppWidened
from pyvolconv.problem import LAYOUTS, ConvProblem

from ..conftest import between_guards
from .units import CELLS, WITH, integers, same_bits, unit_of

DTYPES = tuple(PARTS)
NOT_SPLIT = {"infinity": torch.inf, "minus infinity": -torch.inf, "NaN": torch.nan}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "text"), CELLS)
def test_bound_and_integers(
    name, text, layout, dtype, operands, run_pass, reference, assert_within_bound, threads, poisoned
):
    """Small integers are one part each. The same bits for every run and thread count, and from both units."""
    backend = unit_of(name)
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
    for pass_ in WITH:
        args = operands(problem, pass_, integers=True)
        threads(1)
        got = run_pass(backend, problem, pass_, args)
        assert got.dtype == args[0].dtype
        assert torch.equal(got, reference(problem, pass_, args).to(got.dtype))
        args = operands(problem, pass_)
        got = run_pass(backend, problem, pass_, args)
        assert_within_bound(got, problem, pass_, args, backend.accuracy(problem, pass_))
        for count in (2, 3) if name == "own" else (2,):
            threads(count)
            assert same_bits(run_pass(backend, problem, pass_, args), got), f"other bits with {count} threads"
        if name == "plain" and kernels().has_matrix_unit():
            assert same_bits(run_pass(unit_of("own"), problem, pass_, args), got), "the units differ"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("float16", (2**11, 3)), ("float16", (85, 2**9)), ("float16", (2**11, 85)), ("bfloat16", (2**8, 2**8))],
)
def test_large_integers_are_exact(dtype, largest, layout, unit, each_pass, run_pass, reference):
    """Of two parts times one, also where three taps are two; of one times one."""
    kernel = "k3" if layout == "ndhwc" else "k2x1x3"
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-n1ic5oc4-i4x4x5-{kernel}-p1")
    shapes = operand_shapes(problem, each_pass)
    args = [
        between_guards(integers(shape, most, layout).to(getattr(torch, dtype)))
        for shape, most in zip(shapes, largest, strict=True)
    ]
    got = run_pass(unit, problem, each_pass, args)
    assert torch.equal(got, reference(problem, each_pass, args).to(got.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_the_whole_value(dtype, unit):
    """Times one every value is the result, those below float16's smallest normal number too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(getattr(torch, dtype))
    values = values[values.isfinite() & ((values == 0) | (values.float().abs() >= torch.finfo(torch.float32).tiny))]
    problem = ConvProblem.parse(f"cpu-{dtype}-ndhwc-n1ic1oc1-i1x1x{len(values)}-k1")
    x, one = values.view(problem.input_shape), torch.ones(problem.weight_shape, dtype=values.dtype)
    assert torch.equal(unit.forward(problem, x, one, None), x)
    assert torch.equal(unit.grad_input(problem, x, one), x)
    assert unit.grad_weight(problem, torch.ones_like(x[..., :1]), x[..., :1]).dtype == values.dtype


def test_sums_beyond_float16_are_infinite(unit, each_pass):
    problem = ConvProblem.parse("cpu-float16-ncdhw-n1ic3oc2-i3-k1")
    args = [torch.full(shape, 60000.0, dtype=torch.float16) for shape in operand_shapes(problem, each_pass)]
    call = {"forward": lambda: unit.forward(problem, *args, None)}
    got = call.get(each_pass, lambda: getattr(unit, each_pass)(problem, *args))()
    assert bool((got == torch.inf).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", NOT_SPLIT.values(), ids=NOT_SPLIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cannot_be_split_is_left_to_others(dtype, value, which, layout, unit, each_pass, operands, run_pass):
    """One such value, of the last sample: the result is that of cpp.widened to the bit."""
    kernel = "k3" if layout == "ndhwc" else "k2"  # with a transform and without
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-n3ic5oc6-i2x4x4-{kernel}-p1-bias")
    args = operands(problem, each_pass)
    args[which][-1, -1, -1, -1, -1] = value
    assert same_bits(run_pass(unit, problem, each_pass, args), run_pass(CppWidened(), problem, each_pass, args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scratch_of_a_larger_problem_does_not_leak(layout, dtype, unit, each_pass, operands, run_pass, reference):
    for dirty in ("n2ic20oc36-i3x4x9-k2-p1", "n1ic3oc3-i2x2x40-k3-p1"):
        large = ConvProblem.parse(f"cpu-{dtype}-{layout}-{dirty}")
        for text in ("n1ic3oc5-i3x4x5-k3-p1", "n2ic9oc17-i2x3x4-k1x2x2-s1x2x1", "n1ic1oc1-i1x1x7-k1x1x5-p0x0x2"):
            run_pass(unit, large, each_pass, [arg.fill_(float("nan")) for arg in operands(large, each_pass)])
            problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
            args = operands(problem, each_pass, integers=True)
            got = run_pass(unit, problem, each_pass, args)
            assert torch.equal(got, reference(problem, each_pass, args).to(got.dtype))


def test_parts_that_a_dtype_does_not_have(own):
    problem = ConvProblem.parse("cpu-float16-ndhwc-n1ic1oc1-i1-k1")
    for dtype, count in (("float16", 1), ("bfloat16", 2), ("float32", 4), ("float64", 1)):
        with pytest.raises(ValueError, match="products of parts need"):
            kernels().split_forward(plan_of(problem), dtype, count, False, 0, 0, 0, 0)
