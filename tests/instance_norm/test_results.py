"""Instance and batch normalization and the activation behind them: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyvolconv.instance_norm import RunningStatistics, _Call

from ..closeness import assert_close
from .operands import ACTIVATIONS, KINDS, LAYOUTS, SHAPES, by_torch, compiled, leaves, normalized, operands, settings

pytestmark = compiled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mean", [0, 10, 1000])
def test_values_and_gradients(isa, kind, layout, activation, mean):
    """Within the rounding of x, y and the gradients of float64, at any mean, where torch loses more."""
    eps = torch.finfo(torch.float32).eps
    for number, shape in enumerate(SHAPES):
        x = (mean + 2 * torch.randn(shape)).to(memory_format=LAYOUTS[layout])
        weight, bias, slopes = operands(activation, affine=number % 3 != 1)
        mine, wide = leaves(x, weight, bias, slopes), leaves(x, weight, bias, slopes, dtype=torch.float64)
        y = normalized(kind, *mine, **settings(activation))
        exact = by_torch(kind, activation, *wide)
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        assert float((y - exact).abs().max()) <= 8 * eps * float(exact.abs().max()) + eps
        # Where rounding decides whether z is positive, no gradient.
        unsure = by_torch(kind, "none", *wide[:3], None).abs() < 1e-4
        grad = torch.where(unsure, 0, 1 + torch.randn(shape)).to(memory_format=LAYOUTS[layout])
        y.backward(grad)
        # For one sample and a gradient in channels_last_3d torch's own gradients are wrong.
        exact.backward(grad.double().contiguous())
        size, deviation = (
            float(grad.abs().max()),
            float(x.double().var(KINDS[kind], correction=0).add(1e-5).min()) ** 0.5,
        )
        steepest = size / deviation * (1 if weight is None else float(weight.abs().max()))
        for got, expected in zip(mine, wide, strict=True):
            if got is not None:
                terms = steepest if got is mine[0] else size * x.numel() ** 0.5
                error = float((got.grad - expected.grad).abs().max())
                assert error <= 16 * eps * (float(expected.grad.abs().max()) + terms)
        assert mine[0].grad.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 8, 12, 16, 17, 24, 32, 33, 40, 48, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_channels_and_voxels(isa, kind, channels, dtype):
    """Rows of whole vectors end anywhere; nothing beyond a tensor is read as its own."""
    limit = 1e-10 if dtype == torch.float64 else 1e-3
    for voxels in ((1, 1, 2), (1, 3, 5), (2, 3, 4), (9, 11, 13)):
        x, grad = (torch.randn(2, channels, *voxels, dtype=torch.float64) for _ in range(2))
        weight, bias, slopes = operands("slopes", channels, torch.float64)
        x, grad, weight, bias, slopes = (one.to(dtype).double() for one in (x, grad, weight, bias, slopes))
        expected = leaves(x, weight, bias, slopes)
        exact = by_torch(kind, "slopes", *expected)
        unsure = by_torch(kind, "none", *expected[:3], None).abs() < 1e-4
        grad = torch.where(unsure, 0, grad)
        exact.backward(grad)
        for memory_format in LAYOUTS.values():
            mine = leaves(x.to(memory_format=memory_format), weight, bias, slopes, dtype=dtype)
            y = normalized(kind, *mine)
            y.backward(grad.to(dtype))
            results = [y, *(leaf.grad for leaf in mine)]
            for got, wanted in zip(results, [exact, *(leaf.grad for leaf in expected)], strict=True):
                assert got.shape == wanted.shape
                # Two voxels make a variance near eps, whose inverse magnifies rounding.
                assert float((got - wanted).abs().max()) <= limit * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 40, 41, 42),
        (3, 32, 20, 20, 20),
        (1, 1, 64, 64, 64),
        (9, 1, 30, 30, 30),
        (5, 40, 3, 7, 11),  # planes that are short
        (2, 700, 5, 4, 3),  # rows that are long
    ],
)
def test_same_bits_at_every_thread_count(isa, threads, kind, layout, shape):
    x, grad = (torch.randn(shape).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias, slopes = operands("slopes", shape[1])
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        mine = leaves(x, weight, bias, slopes)
        y = normalized(kind, *mine)
        y.backward(grad)
        results.append([y, *(leaf.grad for leaf in mine)])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [10, 1000])
def test_gradient_of_the_weight_at_a_large_mean(kind, mean):
    """Group normalization's is wrong in the third digit at a mean of ten."""
    x, grad = mean + torch.randn(1, 4, 40, 40, 40), 1 + torch.randn(1, 4, 40, 40, 40)
    weight, bias, _ = operands("none", 4)
    mine, wide = leaves(x, weight, bias), leaves(x, weight, bias, dtype=torch.float64)
    normalized(kind, *mine).backward(grad)
    by_torch(kind, "none", *wide, None).backward(grad.double())
    torch.testing.assert_close(mine[1].grad.double(), wide[1].grad, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_planes_of_one_value_and_values_that_are_not_finite(kind):
    x = torch.randn(2, 4, 4, 4, 4)
    x[:, 0] = 5.25
    x[0, 1, 1, 2, 3] = float("inf")
    x[1, 2, 0, 0, 0] = float("nan")
    y, expected = normalized(kind, x, None, None, activation="relu"), by_torch(kind, "relu", x, None, None, None)
    assert torch.equal(y[:, 0], torch.zeros(2, 4, 4, 4))  # torch's are as large as rounding makes them
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[:, 1:3].isnan().any()
    assert_close(y[:, 1:], expected[:, 1:], equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_what_is_asked_for(kind):
    x, weight, bias = torch.randn(2, 3, 4, 4, 4), torch.ones(3, requires_grad=True), torch.ones(3)
    y = normalized(kind, x, weight, bias)
    assert [edge[0] is not None for edge in y.grad_fn.next_functions[:3]] == [False, True, False]
    y.sum().backward()  # a gradient without strides
    torch.testing.assert_close(weight.grad, torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_and_gradgradcheck(kind, activation, layout):
    x = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    inputs = leaves(x, *operands(activation, 3, torch.float64)[:2])
    slopes = {"one_slope": torch.tensor([0.3]), "slopes": torch.tensor([0.3, -0.2, 1.5])}.get(activation)
    inputs += leaves(None if slopes is None else slopes.double())

    def function(*tensors):
        return normalized(kind, *tensors, **settings(activation))

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula_is_what_the_kernel_computes(kind, layout):
    call = _Call(layout, layout, kind == "batch", 1e-5, "leaky_relu", 0.2)
    x, grad = (torch.randn(2, 3, 4, 5, 6, dtype=torch.float64).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias, _ = operands("none", 3, torch.float64)
    _, statistics = call.forward(x, weight, bias, None)
    wanted = (True, True, True, False)
    with torch.no_grad():
        got = call.backward(grad, (x, weight, bias, None, statistics), wanted)
    expected = call.formula(grad, x, weight, bias, None, wanted)
    for one, other in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5, 2, 3, 4), (17, 8, 1, 1, 3), (2, 64, 20, 20, 20)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_far_from_one_another(isa, layout, shape):
    """The statistics of a batch whose samples have means of their own, merged; and those that follow."""
    means = torch.tensor([1000.0, -7.0, 0.01]).repeat(6)[: shape[0]].view(-1, 1, 1, 1, 1)
    x = (means + torch.randn(shape)).to(memory_format=LAYOUTS[layout])
    running = torch.randn(shape[1]), torch.rand(shape[1])
    expected = [one.double() for one in running]
    y = normalized("batch", x, None, None, running=RunningStatistics(*running, 0.3))
    exact = F.batch_norm(x.double(), *expected, training=True, momentum=0.3)
    assert_close(y, exact.float())
    assert_close(running, tuple(one.float() for one in expected))
