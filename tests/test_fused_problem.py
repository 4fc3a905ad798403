"""Epilogues as values: strings, sizes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pyvolconv.epilogue import ACTIVATIONS, MaxPool
from pyvolconv.problem import ConvProblem

PLAIN = ConvProblem(2, 4, 6, (9, 10, 11), (3, 3, 3), padding=((1, 1),) * 3, bias=True)


@st.composite
def pools(draw):
    window = draw(st.tuples(*[st.integers(1, 6)] * 3))
    return MaxPool(
        window,
        draw(st.tuples(*[st.integers(1, 7)] * 3)),
        tuple(draw(st.integers(0, size // 2)) for size in window),
        draw(st.booleans()),
    )


@given(pools(), st.sampled_from(ACTIVATIONS), st.floats(0, 1e6))
def test_string_and_back(pool, activation, slope):
    assert MaxPool.parse(str(pool)) == pool
    slope = slope if activation == "leaky_relu" else 0.01
    problem = PLAIN.with_(input_size=(40, 41, 42), activation=activation, negative_slope=slope, pool=pool)
    assert ConvProblem.parse(str(problem)) == problem


def test_strings_are_short():
    assert str(PLAIN.with_(activation="relu", pool=MaxPool((2, 2, 2), (2, 2, 2), ceil_mode=True))) == (
        "cpu-float32-ncdhw-n2ic4oc6-i9x10x11-k3-p1-bias-relu-pool2ceil"
    )
    pool = MaxPool((3, 2, 2), (2, 2, 2), (1, 0, 0))
    assert str(PLAIN.with_(activation="leaky_relu", negative_slope=0.2, pool=pool)).endswith(
        "-bias-leaky_relu(0.2)-pool3x2x2s2p1x0x0"
    )


@given(pools(), st.tuples(*[st.integers(6, 15)] * 3))
def test_sizes_are_those_of_torch(pool, size):
    pooled = F.max_pool3d(torch.empty(1, 1, *size), pool.window, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
    assert tuple(pooled.shape[2:]) == pool.output_size(size)


@given(pools())
def test_overlap_is_the_most_windows_of_a_voxel(pool):
    """Counted in a row long enough that no end of it matters."""
    most = 1
    for window, stride in zip(pool.window, pool.stride, strict=True):
        counts = [sum(start <= voxel < start + window for start in range(0, 60, stride)) for voxel in range(20, 40)]
        most *= max(counts)
    assert pool.overlap == most


def test_work_of_a_fused_pass():
    pool = MaxPool((2, 2, 2), (2, 2, 2))
    fused = PLAIN.with_(activation="relu", pool=pool)
    pooled = 2 * 6 * 4 * 5 * 5
    assert fused.pooled_shape == (2, 6, 4, 5, 5)
    assert fused.flops("forward") == PLAIN.flops("forward")
    assert fused.flops("grad_input") == 2 * pooled * 4 * 27
    assert fused.flops("grad_weight") == 2 * pooled * 4 * 27 + pooled  # the gradient of the bias comes with it
    assert fused.with_(bias=False).flops("grad_weight") == 2 * pooled * 4 * 27
    values = math.prod(PLAIN.input_shape) + pooled + math.prod(PLAIN.weight_shape)
    assert fused.min_bytes("grad_input") == 4 * values + pooled
    assert fused.min_bytes("grad_weight") == fused.min_bytes("forward") == 4 * (values + 6) + pooled
    assert fused.reduction_length("grad_weight") == 2 * 4 * 5 * 5
    assert fused.reduction_length("grad_input") == PLAIN.reduction_length("grad_input")
    overlapping = PLAIN.with_(pool=MaxPool((3, 3, 3), (2, 2, 1)))
    assert overlapping.reduction_length("grad_input") == PLAIN.reduction_length("grad_input") * 2 * 2 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh", "pool": MaxPool((2, 2, 2), (2, 2, 2))}, "activation='tanh' must be one of"),
        ({"activation": "relu"}, "activation='relu' is fused in front of a pool only"),
        ({"negative_slope": 0.2, "pool": MaxPool((2, 2, 2), (2, 2, 2))}, "negative_slope=0.2 is of leaky_relu"),
        ({"pool": MaxPool((12, 2, 2), (2, 2, 2))}, "pool window=.12, 2, 2. is larger than"),
        (
            {"activation": "leaky_relu", "negative_slope": -0.1, "pool": MaxPool((2, 2, 2), (2, 2, 2))},
            "negative_slope=-0.1 must be finite and not negative",
        ),
    ],
)
def test_refuses_impossible_epilogues(changes, message):
    with pytest.raises(ValueError, match=message):
        PLAIN.with_(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 1, 1), (1, 1, 1)), "pool window=.0, 1, 1. must be at least 1"),
        (((2, 2, 2), (1, 0, 1)), "pool stride=.1, 0, 1. must be at least 1"),
        (((7, 7, 7), (1, 1, 1)), "more than 255 voxels"),
        (((3, 3, 3), (1, 1, 1), (2, 0, 0)), "pool padding=.2, 0, 0. must lie between 0 and half of"),
        (((3, 3, 3), (1, 1, 1), (-1, 0, 0)), "pool padding=.-1, 0, 0. must lie between 0 and half of"),
    ],
)
def test_refuses_impossible_pools(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaxPool(*arguments)


@pytest.mark.parametrize("text", ["", "2ceil2", "p1", "2s", "2x2"])
def test_parse_refuses_other_texts(text):
    with pytest.raises(ValueError, match=r"is not a max-pool; expected a form like|has 2 axes; expected 1 or 3"):
        MaxPool.parse(text)
