"""`cpp.widened`, which converts some samples at a time, and what the cost model expects of oneDNN."""

from __future__ import annotations

import itertools

import pytest

from pyvolconv.backends import aten, aten_efficiency, cpp_widened
from pyvolconv.backends.cpp_widened import CppWidened
from pyvolconv.dispatch import choose
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

WIDENED = CppWidened()


@pytest.fixture
def few_bytes(monkeypatch):
    """Parts of one or two samples."""
    monkeypatch.setattr(cpp_widened, "COPIED_BYTES", 5_000)
    monkeypatch.setattr(cpp_widened, "COPIED_BYTES_PER_WEIGHT", 0)
    cpp_widened._parts.cache_clear()
    yield
    cpp_widened._parts.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", cpp_widened.DTYPES)
@pytest.mark.parametrize("text", ["n5ic8oc16-i4x5x6-k3-p1-bias", "n5g20ic20oc20-i4x5x6-k3-p1", "n5ic3oc4-i4x6x8-k2-s2"])
def test_several_parts_are_one_batch(
    text, dtype, layout, pass_, few_bytes, require, operands, run_pass, reference, assert_within_bound
):
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
    require(WIDENED, problem, pass_)
    assert len(cpp_widened._parts(problem, pass_)) > 1
    if WIDENED.accuracy(problem, pass_).exact_integers:
        args = operands(problem, pass_, integers=True)
        exact = reference(problem, pass_, args)
        assert run_pass(WIDENED, problem, pass_, args).equal(exact.to(args[0].dtype))
    args = operands(problem, pass_)
    assert_within_bound(run_pass(WIDENED, problem, pass_, args), problem, pass_, args, WIDENED.accuracy(problem, pass_))


def test_parts_cover_the_batch():
    problem = ConvProblem.parse("cpu-float16-ncdhw-n7ic64oc64-i32-k3-p1")
    parts = cpp_widened._parts(problem, "forward")
    assert len(parts) > 1
    assert [begin for begin, _ in parts] == list(itertools.accumulate([0] + [part.batch for _, part in parts[:-1]]))
    assert sum(part.batch for _, part in parts) == 7
    assert all(part.dtype == "float32" and part.layout == "ncdhw" for _, part in parts)


def test_weights_do_not_make_parts_smaller(pass_):
    """They are converted once, and every part's sums of their gradient would have to be added."""
    problem = ConvProblem.parse("cpu-float16-ndhwc-n8ic512oc512-i2x7x7-k3-p1")
    assert len(cpp_widened._parts(problem, pass_)) == 1


def test_float16_does_not_run_in_a_scalar_loop(pass_, require):
    problem = ConvProblem.parse("cpu-float16-ndhwc-n4ic32oc32-i16-k3-p1")
    require(WIDENED, problem, pass_)
    if aten_efficiency._has_float16():
        pytest.skip("oneDNN has float16 kernels here")
    assert choose(problem, pass_).name == "cpp.widened"


@pytest.mark.parametrize(
    "text", ["n1ic1oc1-i2x7x7-k3-p1", "n1ic1oc1-i9x8x7-k3x2x5-s2x3x1-p4x0x2-d1x3x2", "n1ic1oc1-i2x3x4-k3-p4+0x0+5x7+1"]
)
def test_share_of_products_inside(text):
    problem = ConvProblem.parse(f"cpu-float32-ncdhw-{text}")
    share = 1.0
    for axis in range(3):
        positions = [
            out * problem.stride[axis] - problem.padding[axis][0] + tap * problem.dilation[axis]
            for out in range(problem.output_size[axis])
            for tap in range(problem.kernel_size[axis])
        ]
        share *= sum(0 <= position < problem.input_size[axis] for position in positions) / len(positions)
    assert aten_efficiency._inside_share(problem) == pytest.approx(share)


def test_every_expectation_is_positive():
    """A share of nothing would be a division by zero, also where every tap lies in the padding."""
    for text, layout in itertools.product(
        ("n1ic16oc16-i1x1x1-k3-p1", "n1ic1oc1-i1x1x1-k1-p3", "n2ic40oc3-i1-k1"), LAYOUTS
    ):
        for dtype in ("float32", "float64", "float16", "bfloat16"):
            problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
            for pass_ in PASSES:
                assert aten.AtenBackend().expected_efficiency(problem, pass_) > 0
                if not WIDENED.unsupported_reasons(problem, pass_):
                    assert WIDENED.expected_efficiency(problem, pass_) > 0
