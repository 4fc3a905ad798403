"""Every dtype: torch's results and gradients, or its refusal; and whoever computed them is on record."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv
from pyvolconv import dispatch

from .layers import assert_same_outcome, outcome, pair, small_integers

REAL = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
# A name that this version of torch lacks is a dtype that nobody has.
ODD = [getattr(torch, name) for name in ("complex32", "float8_e4m3fn", "uint16", "uint64") if hasattr(torch, name)]
OPTIONS = [{}, {"padding": 1, "stride": 2, "groups": 2}, {"dilation": 2, "padding": 2}]


def set_integers(layer, values):
    """Makes `values`, by name, the parameters of the layer."""
    for key, value in values.items():
        differentiable = value.is_floating_point() or value.is_complex()
        setattr(layer, key, nn.Parameter(value.clone(), requires_grad=differentiable))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, *WHOLE, *ODD], ids=str)
def test_results_and_gradients(kind, name, dtype, options):
    ours, theirs = pair(kind, name, 4, 6, 3, **options)
    values = {key: small_integers(*value.shape, dtype=dtype) for key, value in theirs.named_parameters()}
    for layer in (ours, theirs):
        set_integers(layer, values)
    x = small_integers(2, 4, 5, 6, 7, dtype=dtype)
    differentiable = dtype in REAL + COMPLEX
    x.requires_grad_(differentiable)
    got, expected = outcome(ours, x), outcome(theirs, x)
    assert_same_outcome(got, expected)
    if not differentiable:
        return
    cotangent = small_integers(*expected.shape, dtype=dtype)
    mine = torch.autograd.grad(got, [x, *ours.parameters()], cotangent)
    other = torch.autograd.grad(expected, [x, *theirs.parameters()], cotangent)
    for gradient, wanted in zip(mine, other, strict=True):
        assert_same_outcome(gradient, wanted)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, *WHOLE], ids=str)
@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_whoever_computes_is_on_record(name, dtype, caplog):
    """Each pass is ours, or a message says that it is not."""
    x, w = small_integers(2, 4, 5, 6, 7, dtype=dtype), small_integers(4, 4, 3, 3, 3, dtype=dtype)
    with caplog.at_level("WARNING", "pyvolconv"), dispatch.listen() as asked:
        got = outcome(getattr(pyvolconv, name), x, w)
    assert_same_outcome(got, outcome(getattr(F, name), x, w))
    # What has no kernels of ours is refused by torch where it has none either.
    assert asked or dtype == torch.bool
    for problem, pass_ in asked:
        messages = [record.getMessage() for record in caplog.records]
        is_ours = dispatch.choose(problem, pass_).ours
        assert is_ours == (not any(f"{pass_} of {problem} runs in ATen" in message for message in messages))
        assert is_ours or dtype not in (torch.float32, torch.float64)
        assert not is_ours or dtype in REAL


@pytest.mark.parametrize("other", [torch.float64, torch.float16, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_mixed_dtypes_are_refused_in_the_same_words(kind, name, which, other):
    ours, theirs = pair(kind, name, 4, 6, 3)
    x = torch.randn(1, 4, 5, 5, 5).to(other if which == "x" else torch.float32)
    if which != "x":
        values = {which: getattr(theirs, which).detach().to(other)}
        set_integers(ours, values)
        set_integers(theirs, values)
    got, expected = outcome(ours, x), outcome(theirs, x)
    assert isinstance(expected, RuntimeError)
    assert_same_outcome(got, expected)
