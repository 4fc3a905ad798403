"""torch.autocast: which dtypes are cast and which refused, what gradients have, and what transforms change."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

import pyvolconv

from .cases import FUNCTIONS, PAIRS, outcome, sample

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64)
LOW = (torch.bfloat16, torch.float16)
OPERATORS = [
    f"pyvolconv::{name}{suffix}"
    for name in ("conv3d", "conv3d_max_pool")
    for suffix in ("", "_grad_input", "_grad_weight")
] + ["pyvolconv::conv3d_activation"]


def operands(requires_grad=True):
    """Integers, whose sums are exact before they are rounded: a pool chooses the same voxels in every kernel."""
    shapes = ((2, 4, 4, 4, 4), (4, 4, 3, 2, 3), (4,))
    return tuple(torch.randint(-3, 4, shape).float().requires_grad_(requires_grad) for shape in shapes)


def assert_close(got, expected, dtype=torch.bfloat16):
    """Within a few roundings to `dtype` of the largest value."""
    assert got.dtype == expected.dtype
    largest = float(expected.abs().max())
    torch.testing.assert_close(got / largest, expected / largest, rtol=0, atol=4 * torch.finfo(dtype).eps)


def words(error):
    """Without the name that oneDNN's own tensors go by in torch's message."""
    return "" if error is None else re.sub(r" or input should be a MKLDNN.*", "", str(error))


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_dtypes_of_operands(name, low):
    """Every combination: computed in the dtype that torch computes it in, or refused with its words."""
    ours, theirs = FUNCTIONS[name]
    refused = 0
    for dtypes in itertools.product(DTYPES, DTYPES, [None, *DTYPES]):
        shapes = ((2, 4, 4, 4, 4), (4, 4, 2, 2, 2), (4,))
        args = [
            None if dtype is None else torch.randint(-3, 4, shape).to(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        with torch.autocast("cpu", low):
            (got, error), (expected, expected_error) = outcome(ours, *args), outcome(theirs, *args)
        assert type(error) is type(expected_error), dtypes
        assert words(error) == words(expected_error), dtypes
        refused += error is not None
        if error is None:
            assert got.dtype == expected.dtype, dtypes
            assert_close(got, expected, low)
    assert 100 < refused < 252


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_results_and_gradients(ours, theirs, low):
    results = []
    args = operands()
    for function in (ours, theirs):
        with torch.autocast("cpu", low):
            y = function(*args)
        results.append((y, *torch.autograd.grad(y.float().pow(2).sum(), args)))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, low)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_keep_the_dtype_of_their_forward_call(ours, theirs):
    """Gradients of a call outside of autocast are exact inside of it, those of a call inside are cast outside."""
    args = operands()
    y = ours(*args)
    cotangent = torch.randn_like(y)
    expected = torch.autograd.grad(y, args, cotangent, create_graph=True)
    second = torch.autograd.grad(expected[0].pow(2).sum(), args[1], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, args, cotangent, create_graph=True)
        assert torch.equal(torch.autograd.grad(got[0].pow(2).sum(), args[1])[0], second[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        y, exact = ours(*args), theirs(*args)
        inside = torch.autograd.grad(y, args, torch.ones_like(y), retain_graph=True)
    outside = torch.autograd.grad(y, args, torch.ones_like(y))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    for got, expected in zip(outside, torch.autograd.grad(exact, args, torch.ones_like(exact)), strict=True):
        assert_close(got, expected)


TRANSFORMS = {
    "vmap": lambda f, x, w: vmap(lambda x: f(x, w))(x),
    "vmap of weights": lambda f, x, w: vmap(lambda w: f(x[0], w))(torch.stack([w, w])),
    "jvp": lambda f, x, w: jvp(lambda w: f(x[0], w), (w,), (w,))[1],
    "vmap of grad": lambda f, x, w: vmap(grad(lambda w, x: f(x, w).float().pow(2).sum()), (None, 0))(w, x),
    "grad of vmap": lambda f, x, w: grad(lambda w: vmap(lambda x: f(x, w))(x).float().pow(2).sum())(w),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_transforms(ours, theirs, transform):
    """vmap takes a convolution apart before autocast sees it; the others do not."""
    _, w, _ = operands(requires_grad=False)
    x = torch.randint(-3, 4, (3, 2, 4, 4, 4, 4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (TRANSFORMS[transform](function, x, w) for function in (ours, theirs))
    assert_close(got, expected)
    if transform == "vmap":
        assert torch.equal(got, TRANSFORMS[transform](ours, x, w)), "not rounded on the way"


def test_dtypes_that_do_not_fit_are_refused_under_vmap_too():
    x, w = torch.randn(3, 1, 2, 4, 4, 4).bfloat16(), torch.randn(2, 2, 3, 3, 3)
    for function in (pyvolconv.conv3d, pyvolconv.conv_transpose3d):
        with torch.autocast("cpu", torch.bfloat16):
            assert vmap(lambda x: x + 1)(x).dtype == torch.bfloat16
            with pytest.raises(RuntimeError):
                vmap(lambda x, function=function: getattr(F, function.__name__)(x, w))(x)
            with pytest.raises(RuntimeError):
                vmap(lambda x, function=function: function(x, w))(x)


@pytest.mark.parametrize("low", LOW)
def test_models(pair, low):
    ours, theirs = (model.float() for model in pair)
    x = sample().float()
    with torch.autocast("cpu", low):
        y, expected = ours(x), theirs(x)
    assert_close(y, expected, low)
    gradients = torch.autograd.grad(y.float().sum(), list(ours.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_meta_tensors_are_not_cast():
    x, w, _ = (tensor.to("meta") for tensor in operands(requires_grad=False))
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in FUNCTIONS.values():
            assert ours(x, w).dtype == theirs(x, w).dtype


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_kernel_for_autocast_on_every_device(operator):
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
