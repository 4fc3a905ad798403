"""The convolution as a value: its string, its derived sizes, its refusals."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pyvolconv.problem import DTYPE_BYTES, LAYOUTS, PASSES, ConvProblem


@st.composite
def problems(draw, largest=9):
    def triple(low, high):
        return st.tuples(*[st.integers(low, high)] * 3)

    groups = draw(st.integers(1, 3))
    kernel_size, dilation = draw(triple(1, 4)), draw(triple(1, 3))
    padding = tuple(draw(st.tuples(st.integers(0, 3), st.integers(0, 3))) for _ in range(3))
    needed = [d * (k - 1) + 1 - sum(pair) for k, d, pair in zip(kernel_size, dilation, padding, strict=True)]
    return ConvProblem(
        batch=draw(st.integers(0, 3)),
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        input_size=tuple(draw(st.integers(max(least, 1), max(least, 1) + largest)) for least in needed),
        kernel_size=kernel_size,
        stride=draw(triple(1, 4)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
        layout=draw(st.sampled_from(LAYOUTS)),
        device=draw(st.sampled_from(["cpu", "cuda", "meta"])),
        bias=draw(st.booleans()),
    )


@given(problems())
@example(ConvProblem(1, 1, 1, (3, 3, 3), (1, 1, 1), padding=((0, 1), (0, 1), (0, 1))))
@example(ConvProblem(1, 1, 1, (3, 3, 3), (1, 1, 1), padding=((1, 1), (0, 0), (2, 2))))
def test_string_and_back(problem):
    assert ConvProblem.parse(str(problem)) == problem
    assert {problem: 1}[pickle.loads(pickle.dumps(problem))] == 1


def test_string_is_short_and_names_what_differs_from_the_default():
    assert str(ConvProblem(8, 16, 24, (15, 15, 30), (3, 3, 3), padding=((1, 1),) * 3)) == (
        "cpu-float32-ncdhw-n8ic16oc24-i15x15x30-k3-p1"
    )
    full = ConvProblem(
        1,
        4,
        6,
        (9, 8, 7),
        (1, 2, 3),
        (1, 2, 1),
        ((0, 0), (1, 0), (2, 2)),
        (1, 1, 2),
        2,
        "bfloat16",
        "ndhwc",
        "cuda",
        True,
    )
    assert str(full) == "cuda-bfloat16-ndhwc-n1g2ic4oc6-i9x8x7-k1x2x3-s1x2x1-p0x1+0x2-d1x1x2-bias"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "conv",
        "cpu-float32-ncdhw-n1ic1oc1-i3x3x3",
        "cpu-float32-nchw-n1ic1oc1-i3x3x3-k1",
        "cpu-float32-ncdhw-n1ic1oc1-i3x3x3-k1-bias-extra",
        "cpu-float32-ncdhw-n-1ic1oc1-i3x3x3-k1",
        " cpu-float32-ncdhw-n1ic1oc1-i3x3x3-k1",
    ],
)
def test_parse_names_the_text_it_refuses(text):
    with pytest.raises(ValueError, match="is not a convolution problem; expected a form like") as raised:
        ConvProblem.parse(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu-float32-ncdhw-n1ic1oc1-i3x3x3-k1x2", "'1x2' has 2 axes; expected 1 or 3"),
        ("cpu-float32-ncdhw-n1ic1oc1-i3x3-k1", "'3x3' has 2 axes; expected 1 or 3"),
        ("cpu-float8-ncdhw-n1ic1oc1-i3x3x3-k1", "dtype='float8' must be one of"),
        ("cpu-float32-ncdhw-n1ic1oc1-i3x3x3-k4", "is larger than"),
        ("cpu-float32-ncdhw-n1g2ic3oc2-i3x3x3-k1", "groups=2 must be positive and divide in_channels=3"),
        ("cpu-float32-ncdhw-n1ic1oc1-i3x3x3-k0", "kernel_size=.0, 0, 0. must be at least 1"),
        ("cpu-float32-ncdhw-n1ic1oc1-i3x3x3-k1-s1x0x1", "stride=.1, 0, 1. must be at least 1"),
    ],
)
def test_parse_refuses_impossible_sizes(text, message):
    with pytest.raises(ValueError, match=message):
        ConvProblem.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, "groups=0 must be positive"),
        ({"groups": 3}, "divide in_channels=4"),
        ({"kernel_size": (3, 0, 3)}, "kernel_size"),
        ({"stride": (1, 1, -1)}, "stride"),
        ({"dilation": (0, 1, 1)}, "dilation"),
        ({"batch": -1}, "negative size"),
        ({"input_size": (8, -8, 8)}, "negative size"),
        ({"padding": ((0, 0), (0, -1), (0, 0))}, "padding"),
        ({"layout": "nhwc"}, "layout='nhwc' must be one of"),
        ({"dtype": "float"}, "dtype='float' must be one of"),
        ({"kernel_size": (9, 3, 3)}, "larger than input_size=.8, 8, 8. with padding"),
        ({"dilation": (4, 1, 1)}, "larger than"),
    ],
)
def test_refuses_impossible_sizes(changes, message):
    good = ConvProblem(1, 4, 4, (8, 8, 8), (3, 3, 3))
    with pytest.raises(ValueError, match=message):
        good.with_(**changes)


@settings(max_examples=50)
@given(problems())
def test_shapes_are_those_of_torch(problem):
    x = torch.empty(problem.input_shape, device="meta")
    w = torch.empty(problem.weight_shape, device="meta")
    sides = [side for pair in reversed(problem.padding) for side in pair]
    y = F.conv3d(F.pad(x, sides), w, None, problem.stride, 0, problem.dilation, problem.groups)
    assert tuple(y.shape) == problem.output_shape


@settings(max_examples=50)
@given(problems().filter(lambda problem: problem.batch > 0))
def test_flops_are_those_of_torchs_counter(problem):
    """In the forward pass; it counts no bias."""
    problem = problem.with_(bias=False)
    x = torch.empty(problem.input_shape, device="meta")
    w = torch.empty(problem.weight_shape, device="meta")
    sides = [side for pair in reversed(problem.padding) for side in pair]
    with FlopCounterMode(display=False) as counter:
        F.conv3d(F.pad(x, sides), w, None, problem.stride, 0, problem.dilation, problem.groups)
    assert {problem.flops(pass_) for pass_ in PASSES} == {counter.get_total_flops()}
    with_bias = problem.with_(bias=True)
    assert with_bias.flops("forward") - problem.flops("forward") == math.prod(problem.output_shape)
    assert with_bias.flops("grad_weight") == problem.flops("grad_weight")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes(dtype):
    assert torch.empty((), dtype=getattr(torch, dtype)).element_size() == DTYPE_BYTES[dtype]
    problem = ConvProblem(2, 4, 6, (5, 6, 7), (3, 3, 3), groups=2, dtype=dtype)
    values = 2 * 4 * 5 * 6 * 7 + 2 * 6 * 3 * 4 * 5 + 6 * 2 * 27
    assert {problem.min_bytes(pass_) for pass_ in PASSES} == {values * DTYPE_BYTES[dtype]}
    assert problem.with_(bias=True).min_bytes("forward") == (values + 6) * DTYPE_BYTES[dtype]
    assert problem.with_(bias=True).min_bytes("grad_input") == values * DTYPE_BYTES[dtype]


def _products_per_value(problem, products):
    counts = {pass_: Counter() for pass_ in PASSES}
    for at_x, at_w, at_y in products(problem):
        for pass_, at in zip(PASSES, (at_y, at_x, at_w), strict=True):
            counts[pass_][at] += 1
    return {pass_: max(counts[pass_].values(), default=0) for pass_ in PASSES}


@pytest.mark.parametrize(
    "text",
    [
        "n2ic2oc3-i7x8x9-k3",
        "n1g2ic4oc6-i8x8x8-k3x2x3",
        "n1ic1oc2-i11x11x11-k3-s2",
        "n1ic1oc1-i11x11x11-k2-s4x3x2",
        "n1ic1oc1-i14x14x14-k3x4x5-s2x4x3-d3x2x1",
        "n1ic1oc1-i25x25x5-k4x3x2-s6x4x2-d4x6x2",
    ],
)
def test_reduction_length_is_reached(text, products):
    problem = ConvProblem.parse(f"cpu-float32-ncdhw-{text}")
    assert _products_per_value(problem, products) == {pass_: problem.reduction_length(pass_) for pass_ in PASSES}


@settings(max_examples=50)
@given(st.data())
def test_reduction_length_is_never_exceeded(products, data):
    problem = data.draw(problems(largest=2).filter(lambda problem: problem.batch < 2))
    problem = problem.with_(input_size=tuple(min(size, 7) for size in problem.input_size), padding=((3, 3),) * 3)
    for pass_, most in _products_per_value(problem, products).items():
        assert most <= problem.reduction_length(pass_)
