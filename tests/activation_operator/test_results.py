"""Values and first gradients of `conv3d_activation` are torch's; what it keeps, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyvolconv

from ..closeness import assert_close
from .calls import CASES, GEOMETRY, LAYOUTS, operands, ours, outcome, theirs

BACKENDS = ("cpp", "im2col", "aten")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("activation", "residual"), CASES)
def test_values_and_gradients_of_integers(activation, residual, layout, poisoned):
    """Sums are exact in every backend, so the activation gets torch's values, and so do gradients."""
    for name in BACKENDS:
        args = operands(torch.float32, residual, layout=layout, integers=True)
        expected = theirs(activation)(*args)
        cotangent = torch.randint(-3, 4, expected.shape).float()
        with pyvolconv.use_backend(name):
            y = ours(activation)(*args)
            with torch.no_grad():
                alone = ours(activation)(*args)
        assert y.is_contiguous(memory_format=layout)
        assert alone.is_contiguous(memory_format=layout)
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-5} if activation in ("silu", "gelu", "gelu_tanh") else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close((y, alone), (expected, expected), **tolerance)
        # Outside of the block: a gradient keeps the backend of its forward call.
        gradients = [torch.autograd.grad(result, args, cotangent) for result in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=tolerance["rtol"], atol=10 * tolerance["atol"])


def test_residual_of_any_strides():
    x, w, b, r = operands()
    expected = theirs()(x, w, b, r)
    several = [r.to(memory_format=torch.channels_last_3d), r[..., :1].expand_as(r), r.transpose(3, 4).clone().mT]
    for other in (r, *several):
        assert_close(ours()(x, w, b, other), theirs()(x, w, b, other))
    assert torch.equal(ours()(x, w, b, several[0]), ours()(x, w, b, r))
    assert_close(ours()(x[0], w, b, r[0]), expected[0])


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_residual_of_another_shape_or_dtype_is_added_as_torch_adds(activation):
    x, w, b, r = operands()
    for other in (r[:1], r[:, :, :1], r[0], r.float(), r.bfloat16(), r[0, 0, 0, 0, 0], r[:, :2], r.to_sparse()):
        got, error = outcome(ours(activation), x, w, b, other)
        expected, expected_error = outcome(theirs(activation), x, w, b, other)
        assert (type(error), str(error)) == (type(expected_error), str(expected_error))
        if error is None:
            assert_close(got, expected)


def test_empty_operands():
    _, w, b = operands(residual=False)
    for shape in ((0, 4, 4, 6, 5), (2, 4, 4, 6, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        r = torch.randn_like(theirs()(x, w, b), requires_grad=True)
        for activation in ("relu", "gelu"):
            y, expected = ours(activation)(x, w, b, r), theirs(activation)(x, w, b, r)
            assert_close(y, expected)
            leaves = (x, w, b, r)
            assert_close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_other_dtypes(dtype):
    args = tuple(arg.detach() for arg in operands(dtype, integers=True))
    for activation in ("none", "relu", "silu"):
        (got, error), (expected, expected_error) = outcome(ours(activation), *args), outcome(theirs(activation), *args)
        assert (type(error), str(error)) == (type(expected_error), str(expected_error))
        if error is None:
            # Torch rounds sum and result to 16 bits.
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def saved_for(function, args):
    """(result, what is kept for the backward pass beside operands and result)."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = function(*args)
    known = {tensor.data_ptr() for tensor in (*args, y)}
    return y, [tensor for tensor in saved if tensor.data_ptr() not in known]


def test_keeps_the_result_of_relu_and_a_byte_per_value_of_leaky_relu():
    args = operands(torch.float32)
    for activation in ("none", "relu"):
        assert saved_for(ours(activation), args)[1] == []
    y, (mask,) = saved_for(ours("leaky_relu"), args)
    assert (mask.dtype, mask.shape) == (torch.bool, y.shape)


def test_results_may_be_changed_in_place_where_torchs_may():
    for activation in ("relu", "leaky_relu", "silu"):
        for function in (ours(activation), theirs(activation)):
            y = function(*operands()).mul_(2)
            _, error = outcome(y.sum().backward)
            assert (error is None) == (activation != "relu")
            assert error is None or "modified by an inplace operation" in str(error)


def test_derivatives_at_zero_and_nan_are_torchs():
    x = torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0, float("inf"), -float("inf")]).view(7, 1, 1, 1, 1)
    w = torch.ones(1, 1, 1, 1, 1)
    for activation in ("none", "relu", "leaky_relu", "gelu"):
        gradients = []
        for function in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = function(activation, padding=((0, 0),) * 3)(leaf, w)
            gradients.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
        assert_close(*gradients, equal_nan=True)


def test_refuses_impossible_activations():
    x, w, b, r = operands()
    for bad, message in (("tanh", "activation='tanh' must be one of"), ("leaky_relu", "negative_slope=-1.0 must be")):
        with pytest.raises(ValueError, match=message):
            pyvolconv.conv3d_activation(x, w, b, **GEOMETRY, activation=bad, negative_slope=-1.0, residual=r)


def test_wrong_arguments_raise_what_torch_raises():
    x, w, b = operands(residual=False)
    for args in ((x[:, :3], w, b), (x, w.float(), b), (x, w, b[:2])):
        with pytest.raises(RuntimeError) as expected:
            F.conv3d(*args, groups=2)
        with pytest.raises(RuntimeError) as raised:
            pyvolconv.conv3d_activation(*args, groups=2)
        assert str(raised.value) == str(expected.value)
