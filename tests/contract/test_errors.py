"""Wrong calls: the class of torch's error and all of its words, over a table of mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from .layers import assert_same_outcome, outcome, pair

LAYERS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (3, 2, 1), "stride": 2, "padding": (0, 1, 2)},
    {"kernel_size": 3, "dilation": 3, "bias": False},
]


def inputs():
    """Mistakes that users make with an input, and a few that they do not; some layers take some of them."""
    good = torch.randn(1, 4, 5, 6, 7)
    yield from (torch.randn(shape) for shape in [(), (4,), (4, 5, 6), (1, 1, 4, 5, 6, 7)])
    yield from (torch.randn(shape) for shape in [(1, 3, 5, 6, 7), (3, 5, 6, 7), (1, 8, 5, 6, 7), (5, 6, 7, 4)])
    yield from (torch.randn(shape) for shape in [(1, 4, 2, 5, 5), (4, 2, 5, 5), (1, 4, 1, 1, 1), (1, 4, 5, 6, 0)])
    yield from (good.to(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64))
    yield from (good.to("meta"), good.to_sparse(), good.numpy(), None, 3, [1.0, 2.0], "volume", (good,))
    yield torch.nested.nested_tensor([good[0], good[0]])
    yield torch.quantize_per_tensor(good, 0.1, 0, torch.qint8)


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_inputs(kind, name, options):
    ours, theirs = pair(kind, name, 4, 6, **options)
    refused = 0
    for x in inputs():
        expected = outcome(theirs, x)
        assert_same_outcome(outcome(ours, x), expected)
        refused += isinstance(expected, Exception)
    assert refused >= 15


def test_calls(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    x = torch.randn(1, 4, 5, 5, 5)
    for args, kwargs in [((), {}), ((x, None, None), {}), ((), {"x": x}), ((x,), {"stride": 2}), ((x, x), {})]:
        expected = outcome(theirs, *args, **kwargs)
        assert isinstance(expected, Exception)
        assert_same_outcome(outcome(ours, *args, **kwargs), expected)


CONSTRUCTIONS = [
    ((), {}),
    ((4,), {}),
    ((4, 6), {}),
    ((4, 6, "three"), {}),
    ((4, 6, 3.0), {}),
    ((4, 6, None), {}),
    ((4, -6, 3), {}),
    ((-4, 6, 3), {}),
    ((4, 6, -3), {}),
    ((4, 6, (3, 3)), {"padding": "same"}),
    ((4.0, 6, 3), {}),
    ((4, 6, 3), {"groups": 3}),
    ((4, 6, 3), {"groups": 4}),
    ((4, 6, 3), {"groups": 0}),
    ((4, 6, 3), {"groups": -1}),
    ((4, 6, 3), {"groups": "two"}),
    ((4, 6, 3), {"padding": "full"}),
    ((4, 6, 3), {"padding": "same", "stride": 2}),
    ((4, 6, 3), {"padding_mode": "mirror"}),
    ((4, 6, 3), {"padding_mode": "reflect"}),
    ((4, 6, 3), {"dtype": torch.int64}),
    ((4, 6, 3), {"dtype": "float32"}),
    ((4, 6, 3), {"device": "nowhere"}),
    ((4, 6, 3), {"strides": 2}),
    ((4, 6, 3, 1, 1, 1, 1, True, "zeros", None, None, 1), {}),
]


@pytest.mark.parametrize("name", ["Conv3d", "ConvTranspose3d", "LazyConv3d", "LazyConvTranspose3d"])
def test_constructions(name):
    refused = 0
    for args, kwargs in CONSTRUCTIONS:
        if "Lazy" in name:
            args = args[1:]
        expected = outcome(lambda args=args, kwargs=kwargs: repr(getattr(nn, name)(*args, **kwargs)))
        got = outcome(lambda args=args, kwargs=kwargs: repr(getattr(pyvolconv, name)(*args, **kwargs)))
        assert_same_outcome(got, expected)
        refused += isinstance(expected, Exception)
    assert refused >= 10


ATTRIBUTES = [
    *(("stride", value) for value in (0, -1, (0, 1, 1), (1, 1), (1, 1, 1, 1), "one", 1.5, None, True, ())),
    *(("padding", value) for value in (-1, (-1, 0, 0), (1, 1), (1, 1, 1, 1), "full", None, True, 1.0)),
    *(("dilation", value) for value in (0, -1, (1, 0, 1), (1, 1), "one", 1.5, None, True)),
    *(("groups", value) for value in (0, -1, 3, 5, 1.0, None, "one")),
    *(("output_padding", value) for value in (-1, 3, (1, 2, 3), (0, 1), "one", None)),
    ("weight", None),
]


@pytest.mark.parametrize(("attribute", "value"), ATTRIBUTES, ids=str)
def test_attributes(kind, name, attribute, value):
    ours, theirs = pair(kind, name, 4, 6, 3)
    for layer in (ours, theirs):
        setattr(layer, attribute, value)
    x = torch.randn(1, 4, 5, 6, 7)
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))


PARAMETERS = [
    *(("bias", shape) for shape in [(5,), (6, 1), (1,), (), (0,), (12,)]),
    *(("weight", shape) for shape in [(6, 4, 3, 3), (6, 4, 3, 3, 3, 1), (6, 5, 3, 3, 3), (5, 4, 3, 3, 3), ()]),
    *(("weight", shape) for shape in [(0, 4, 3, 3, 3), (6, 0, 3, 3, 3), (6, 4, 0, 3, 3), (4, 0, 3, 3, 3)]),
]


@pytest.mark.parametrize(("parameter", "shape"), PARAMETERS, ids=str)
def test_parameters(kind, name, parameter, shape):
    ours, theirs = pair(kind, name, 4, 6, 3)
    value = nn.Parameter(torch.randn(shape))
    for layer in (ours, theirs):
        setattr(layer, parameter, value)
    x = torch.randn(1, 4, 5, 6, 7)
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))


@pytest.mark.parametrize(
    "size", [[7, 7, 7], [8, 9, 10], [9, 11, 13], [7, 7], [1, 6, 8, 9, 10], 7, "size", [-1, 7, 7], []]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_output_size(kind, size, stride):
    ours, theirs = pair(kind, "ConvTranspose3d", 4, 6, 3, stride=stride)
    for x in (torch.randn(1, 4, 3, 4, 5), torch.randn(4, 3, 4, 5)):
        assert_same_outcome(outcome(ours, x, size), outcome(theirs, x, size))
        assert_same_outcome(outcome(ours, x, output_size=size), outcome(theirs, x, output_size=size))


@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_functions(name):
    """Torch repeats a call that fits no signature; ours is repeated with every argument, as modules pass them."""
    x, w = torch.randn(1, 4, 5, 6, 7), torch.randn(4, 4, 3, 3, 3)
    rest = (1, 0, 1, 1) if name == "conv3d" else (1, 0, 0, 1, 1)
    for first, second, bias in [
        (x, None, None),
        (None, w, None),
        (x, w, 3),
        (x, w.numpy(), None),
        (x, [w], None),
        (x, w.to_sparse(), None),
        (x, w, w),
        (x, w.half(), None),
    ]:
        expected = outcome(getattr(F, name), first, second, bias, *rest)
        assert isinstance(expected, Exception)
        assert_same_outcome(outcome(getattr(pyvolconv, name), first, second, bias), expected)


@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_functions_with_missing_or_unknown_arguments(name):
    """Torch prints its signatures then; ours is a function of Python, whose words name the argument."""
    x, w = torch.randn(1, 4, 5, 6, 7), torch.randn(4, 4, 3, 3, 3)
    for arguments, options, words in [((x,), {}, "weight"), ((x, w), {"foo": 1}, "foo")]:
        with pytest.raises(TypeError):
            getattr(F, name)(*arguments, **options)
        with pytest.raises(TypeError, match=words):
            getattr(pyvolconv, name)(*arguments, **options)
