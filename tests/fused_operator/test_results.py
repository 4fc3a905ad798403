"""Values and first gradients of `conv3d_max_pool` are torch's; what it keeps, and what it refuses."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pyvolconv
from pyvolconv.backends.registry import REGISTRY

from ..closeness import assert_close
from .calls import (
    ACTIVATION_AND_POOL,
    ACTIVATIONS,
    WITH_PASSES,
    WITHOUT_PASSES,
    operands,
    ours,
    theirs,
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
@pytest.mark.parametrize("name", [*WITH_PASSES, *WITHOUT_PASSES])
def test_values_and_gradients_are_torchs(name, activation, pool, layout, poisoned):
    args = operands(layout=layout)
    expected = theirs(activation, pool)(*args)
    cotangent = torch.randn_like(expected)
    with pyvolconv.use_backend(name):
        y = ours(activation, pool)(*args)
    assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    # Outside of the block: a gradient keeps the backend of its forward call.
    assert_close(torch.autograd.grad(y, args, cotangent), torch.autograd.grad(expected, args, cotangent))


@st.composite
def calls(draw):
    """(shape of x, shape of w, geometry of the convolution, arguments of max_pool3d, activation), all of which fit."""

    def triple(low, high):
        return st.tuples(*[st.integers(low, high)] * 3)

    groups = draw(st.integers(1, 3))
    kernel, dilation, padding, stride = draw(triple(1, 3)), draw(triple(1, 2)), draw(triple(0, 2)), draw(triple(1, 3))
    window, ceil_mode = draw(triple(1, 4)), draw(st.booleans())
    pool_padding = tuple(draw(st.integers(0, size // 2)) for size in window)
    dense = [draw(st.integers(size - 2 * pad, size + 5)) for size, pad in zip(window, pool_padding, strict=True)]
    input_size = [
        max((size - 1) * s + d * (k - 1) + 1 - 2 * p, 1)
        for size, s, d, k, p in zip(map(partial(max, 1), dense), stride, dilation, kernel, padding, strict=True)
    ]
    channels = draw(st.integers(1, 5))
    return (
        (draw(st.integers(1, 3)), groups * channels, *input_size),
        (groups * draw(st.integers(1, 9)), channels, *kernel),
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        (window, draw(triple(1, 4)), pool_padding, 1, ceil_mode),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
    )


@settings(max_examples=100)
@given(calls(), st.sampled_from(WITH_PASSES), st.sampled_from([torch.contiguous_format, torch.channels_last_3d]))
def test_any_call_is_torchs(call, name, layout):
    input_shape, weight_shape, geometry, pool, activation = call
    x, w = (torch.randn(shape).double().contiguous(memory_format=layout) for shape in (input_shape, weight_shape))
    args = tuple(tensor.requires_grad_() for tensor in (x, w, torch.randn(weight_shape[0]).double()))
    expected = F.max_pool3d(ACTIVATIONS[activation](F.conv3d(*args, **geometry)), *pool)
    with pyvolconv.use_backend(name):
        y = pyvolconv.conv3d_max_pool(
            *args,
            **geometry,
            activation=activation,
            negative_slope=0.2,
            **dict(zip(("pool_size", "pool_stride", "pool_padding"), pool, strict=False)),
            ceil_mode=pool[-1],
        )
        assert_close(y, expected)
        cotangent = torch.randn_like(y)
        assert_close(torch.autograd.grad(y, args, cotangent), torch.autograd.grad(expected, args, cotangent))


@pytest.mark.parametrize("wanted", [which for which in itertools.product([False, True], repeat=3) if any(which)])
def test_gradients_of_any_subset_of_the_operands(wanted):
    args = tuple(arg.detach().requires_grad_(want) for arg, want in zip(operands(), wanted, strict=True))
    inputs = [arg for arg in args if arg.requires_grad]
    y, expected = ours()(*args), theirs()(*args)
    cotangent = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


def test_never_computes_a_gradient_that_nobody_needs(monkeypatch):
    """The first layer's input asks for none."""
    for backend in REGISTRY:
        if backend.has_max_pool:
            monkeypatch.setattr(type(backend), "grad_input_max_pool", None)
    x, w, b = operands()
    ours()(x.detach(), w, b).sum().backward()
    assert w.grad is not None
    assert b.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_without_a_fused_pass_are_put_together(dtype):
    args = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in operands())
    y, expected = ours("gelu")(*args), theirs("gelu")(*[arg.detach().float() for arg in args])
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert all(got.dtype == dtype for got in torch.autograd.grad(y.sum(), args))


def test_one_sample_and_an_empty_batch():
    _, w, b = operands()
    for shape in ((4, 4, 6, 5), (0, 4, 4, 6, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y, expected = ours()(x, w, b), theirs()(x, w, b)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b)))


def test_keeps_one_byte_per_pooled_value():
    """Saved for backward: operands and code, and nothing of the size of what is pooled."""
    x, w, b = operands(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = ours()(x, w, b)
    extra = [tensor for tensor in saved if all(tensor.data_ptr() != known.data_ptr() for known in (x, w, y))]
    assert [(tensor.dtype, tensor.shape) for tensor in extra] == [(torch.uint8, y.shape)]


def test_relu_and_leaky_relu_have_torchs_derivative_at_zero_and_nan():
    x = torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0, float("inf")]).view(6, 1, 1, 1, 1)
    w = torch.ones(1, 1, 1, 1, 1)
    for activation in ("none", "relu", "leaky_relu"):
        gradients = []
        for function in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = function(activation, "1x2x2", padding=0)(leaf.expand(6, 1, 1, 2, 2), w)
            gradients.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
        assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' must be one of"),
        ({"activation": "leaky_relu", "negative_slope": -1.0}, "negative_slope=-1.0 must be finite and not negative"),
        ({"pool_size": "2"}, "pool_size='2', pool_stride=None and pool_padding=0 must each be one int or three"),
        ({"pool_size": (7, 7, 7)}, "has more than 255 voxels"),
        ({"pool_padding": 2}, "must lie between 0 and half of"),
    ],
)
def test_refuses_impossible_epilogues(options, message):
    x, w, b = operands()
    with pytest.raises(ValueError, match=message):
        pyvolconv.conv3d_max_pool(x, w, b, groups=2, **options)


def test_wrong_arguments_raise_what_torch_raises():
    x, w, b = operands()
    for args, pool in (((x[:, :3], w, b), 2), ((x, w.float(), b), 2), ((x, w, b), 9)):
        with pytest.raises(RuntimeError) as expected:
            F.max_pool3d(F.conv3d(*args, groups=2), pool)
        with pytest.raises(RuntimeError) as raised:
            pyvolconv.conv3d_max_pool(*args, groups=2, pool_size=(pool, 5, 5) if pool == 9 else pool)
        assert str(raised.value)[:40] == str(expected.value)[:40]
