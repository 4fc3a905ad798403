"""The passes fused with activation and max-pool, of every backend that has them, against torch in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvolconv.backends import base
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.epilogue import NO_VOXEL
from pyvolconv.problem import LAYOUTS, ConvProblem

PROBLEMS = (
    # The layers of the mission's network, then other activations and pools.
    "n2ic1oc16-i9x10x11-k3-p1-bias-relu-pool2ceil",
    "n2ic16oc24-i5x6x7-k3-p1-bias-relu-pool2ceil",
    "n1ic24oc32-i4x5x6-k3-p1-relu-pool2",
    "n2ic3oc8-i9x9x10-k5-s2-p2-bias-leaky_relu(0.25)-pool3s2p1",
    "n2g2ic8oc12-i5x4x6-k3-p1-bias-silu-pool2x1x3s1x2x1p1x0x1ceil",
    "n1g4ic4oc4-i6x6x7-k3-p1-gelu-pool2",
    "n3ic5oc7-i5x6x9-k3-bias-gelu_tanh-pool3s2ceil",
    "n2ic12oc20-i3x5x7-k1-bias-pool2s1",
    "n1ic3oc5-i9x9x13-k2x3x3-s1x2x1-p1x2x3-d2x1x3-relu-pool2s3",  # voxels that no window sees
    "n1ic17oc33-i4x3x6-k3-p1+0x1x0+1-relu-pool1x2x2",
    "n1ic2oc3-i7x8x9-k3-p1-relu-pool5x7x7s1p2x3x3",  # a window of 245 voxels
    "n1ic2oc3-i4x4x33-k3-p1-bias-relu-pool2x2x3s2x2x3ceil",
)
INTERPRETED = {
    "n2ic16oc24-i5x6x7-k3-p1-bias-relu-pool2ceil": "ncdhw",
    "n2g2ic8oc12-i5x4x6-k3-p1-bias-silu-pool2x1x3s1x2x1p1x0x1ceil": "ndhwc",
    "n1ic3oc5-i9x9x13-k2x3x3-s1x2x1-p1x2x3-d2x1x3-relu-pool2s3": "ncdhw",
    "n1ic17oc33-i4x3x6-k3-p1+0x1x0+1-relu-pool1x2x2": "ndhwc",
}
"""What Triton's slow interpreter gets here, and in which layout; test_triton_pooled has more for it."""
BACKENDS = tuple(backend for backend in REGISTRY if backend.has_max_pool)
PASSES = ("forward", "grad_input", "grad_weight")
STEEPEST = 1.13
"""No activation here changes faster than its argument times this (silu 1.10, gelu 1.13)."""


def cases(dtypes=("float32", "float64")):
    return [
        pytest.param(
            backend, ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}"), id=f"{backend.name}-{dtype}-{layout}-{text}"
        )
        for backend, dtype, layout, text in itertools.product(BACKENDS, dtypes, LAYOUTS, PROBLEMS)
        if backend.family != "triton" or (dtype == "float32" and INTERPRETED.get(text) == layout)
    ]


def test_the_compiled_backend_and_the_reference_have_them():
    assert {"cpp.direct", "numba"} <= {backend.name for backend in BACKENDS}
    complete = [backend for backend in BACKENDS if backend.name in ("cpp.direct", "numba")]
    for backend, text, pass_ in itertools.product(complete, PROBLEMS, PASSES):
        assert backend.unsupported_reasons(ConvProblem.parse(f"cpu-float32-ncdhw-{text}"), pass_) == []


def require(able, problem, pass_):
    if reasons := able.unsupported_reasons(problem, pass_):
        pytest.skip("; ".join(reasons))


def activate(problem, x):
    slope = problem.negative_slope
    return {
        "none": lambda: x,
        "relu": lambda: F.relu(x),
        "leaky_relu": lambda: F.leaky_relu(x, slope),
        "silu": lambda: F.silu(x),
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
    }[problem.activation]()


def keeps_preactivation(problem):
    return problem.activation in ("silu", "gelu", "gelu_tanh")


def convolve(problem, x, weight, bias=None):
    sides = [side for pair in reversed(problem.padding) for side in pair]
    x, weight = x.double().contiguous(), weight.double().contiguous()
    bias = None if bias is None else bias.double()
    return F.conv3d(F.pad(x, sides), weight, bias, problem.stride, 0, problem.dilation, problem.groups)


def pool_of(problem, x):
    pool = problem.pool
    return F.max_pool3d(x, pool.window, pool.stride, pool.padding, 1, pool.ceil_mode, return_indices=True)


def first_voxels(problem):
    """Where the window of each pooled voxel starts, (3, D', H', W')."""
    pool = problem.pool
    return np.indices(problem.pooled_size) * np.reshape(pool.stride, (3, 1, 1, 1)) - np.reshape(
        pool.padding, (3, 1, 1, 1)
    )


def code_of(problem, indices):
    """torch's indices into the volume as indices into the window."""
    voxels = np.stack(np.unravel_index(indices.numpy(), problem.output_size), axis=2)
    offsets = tuple(np.moveaxis(voxels - first_voxels(problem), 2, 0))
    return torch.from_numpy(np.ravel_multi_index(offsets, problem.pool.window)).to(torch.uint8)


def indices_of(problem, code):
    """The inverse, for what a backend returned; an index outside of the volume is an error. NO_VOXEL has none."""
    _, some = pool_of(problem, torch.zeros(problem.output_shape))
    code = torch.where(code == NO_VOXEL, code_of(problem, some), code)
    offsets = np.stack(np.unravel_index(code.contiguous().numpy(), problem.pool.window), axis=2)
    voxels = tuple(np.moveaxis(offsets + first_voxels(problem), 2, 0))
    return torch.from_numpy(np.ravel_multi_index(voxels, problem.output_size))


def chosen(dense, indices):
    return dense.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)


def scattered(problem, grad, indices):
    dense = torch.zeros(*grad.shape[:2], math.prod(problem.output_size), dtype=torch.float64)
    dense.scatter_add_(2, indices.flatten(2), grad.double().contiguous().flatten(2))
    return dense.view(problem.output_shape)


def between_guards(dense, guard=67):
    fill = float("nan") if dense.is_floating_point() else 255
    buffer = torch.full((dense.numel() + 2 * guard,), fill, dtype=dense.dtype)
    return buffer.as_strided(dense.shape, dense.stride(), guard).copy_(dense)


def tensor_of(problem, shape, integers=False):
    values = torch.randint(-3, 4, shape) if integers else torch.randn(shape, dtype=torch.float64)
    dense = values.to(getattr(torch, problem.dtype))
    if len(shape) == 5:
        dense = dense.contiguous(memory_format=MEMORY_FORMAT[problem.layout])
    return between_guards(dense)


def operands(problem, integers=False):
    bias = tensor_of(problem, (problem.out_channels,), integers) if problem.bias else None
    return tensor_of(problem, problem.input_shape, integers), tensor_of(problem, problem.weight_shape, integers), bias


def gradient_operands(problem, pass_, integers=False):
    """(grad, code, other), torch's indices, and what of the gradients counts.

    A fifth of the gradients is zero; a tenth of the windows chose no voxel, and what stands there may not be read.
    """
    _, indices = pool_of(problem, torch.randn(problem.output_shape, dtype=torch.float64))
    code = code_of(problem, indices).contiguous(memory_format=MEMORY_FORMAT[problem.layout])
    grad = tensor_of(problem, problem.pooled_shape, integers)
    grad[torch.rand(grad.shape) < 0.2] = 0
    counts = grad.clone()
    nowhere = torch.rand(grad.shape) < 0.1
    counts[nowhere], grad[nowhere], code[nowhere] = 0, math.nan, NO_VOXEL
    other = tensor_of(problem, problem.weight_shape if pass_ == "grad_input" else problem.input_shape, integers)
    return (grad, between_guards(code), other), indices, counts


def gradient_of(able, problem, pass_, operands):
    """(dL/dx or dL/dw, dL/dbias or None)"""
    result = getattr(able, f"{pass_}_max_pool")(problem, *operands)
    return result if pass_ == "grad_weight" else (result, None)


def dense_gradient(problem, pass_, grad_output, other):
    """ATen in float64, from the dense gradient of what is pooled."""
    plain = problem.with_(activation="none", negative_slope=0.01, pool=None, dtype="float64", layout="ncdhw")
    return getattr(REGISTRY[-1], pass_)(plain, grad_output, other.double().contiguous())


@pytest.fixture
def guarded_results(monkeypatch):
    """Results lie between guards, hold NaN (codes: 254) at first, and a write outside of them fails the test."""
    buffers = []
    torch_empty = torch.empty

    def empty(*size, **options):
        plain = torch_empty(*size, **options)
        sentinel = 12345.0 if plain.is_floating_point() else 77
        buffer = plain.new_full((plain.numel() + 134,), sentinel)
        buffers.append((buffer, sentinel))
        fill = float("nan") if plain.is_floating_point() else 254
        return buffer.as_strided(plain.shape, plain.stride(), 67).fill_(fill)

    monkeypatch.setattr(base.torch, "empty", empty)
    yield
    monkeypatch.undo()
    for buffer, sentinel in buffers:
        assert bool((buffer[:67] == sentinel).all()), "wrote before the result"
        assert bool((buffer[-67:] == sentinel).all()), "wrote after the result"


@pytest.mark.parametrize(("able", "fused"), cases())
def test_forward_within_bound(able, fused, guarded_results, poisoned, magnitude):
    """The value is that of the chosen voxel, and no other voxel of the window has a larger one, to within rounding."""
    require(able, fused, "forward")
    x, weight, bias = operands(fused)
    value, code = able.forward_max_pool(fused, x, weight, bias)
    assert value.shape == code.shape == fused.pooled_shape
    assert (value.dtype, code.dtype) == (x.dtype, torch.uint8)
    for result in (value, code):
        assert result.is_contiguous(memory_format=MEMORY_FORMAT[fused.layout])
    assert torch.equal(able.max_pool(fused, x, weight, bias), value)

    exact = convolve(fused, x, weight, bias)
    accuracy = able.accuracy(fused, "forward")
    absolute = [tensor.abs() for tensor in (x, weight, bias) if tensor is not None]
    if any(accuracy.reach):
        magnitude = magnitude(fused, "forward", absolute, accuracy.reach)
    else:
        magnitude = convolve(fused, *absolute)
    unit = torch.finfo(getattr(torch, accuracy.accumulate_dtype)).eps
    bound = accuracy.constant * unit * fused.reduction_length("forward") * magnitude
    bound += torch.finfo(x.dtype).eps * exact.abs()
    indices = indices_of(fused, code)
    expected = chosen(exact if keeps_preactivation(fused) else activate(fused, exact), indices)
    nowhere = code == NO_VOXEL
    expected[nowhere] = 0
    assert fused.activation == "relu" or not nowhere.any()
    assert torch.equal(nowhere, value <= 0) or fused.activation != "relu"
    slack = 2 * STEEPEST * pool_of(fused, bound)[0]
    error = (value.double() - expected).abs()
    assert bool((error <= torch.where(nowhere, slack, chosen(bound, indices))).all())
    largest, _ = pool_of(fused, activate(fused, exact))
    found = torch.where(nowhere, 0, chosen(activate(fused, exact), indices))
    assert bool((found >= largest - slack).all())


@pytest.mark.parametrize(("able", "fused"), cases(["float32"]))
def test_forward_exact_on_integers_with_ties_and_nan(able, fused, poisoned):
    """Small integers tie often; with NaN and -inf among them the codes have to be torch's, every one."""
    if keeps_preactivation(fused):
        fused = fused.with_(activation="none")
    require(able, fused, "forward")
    if not able.accuracy(fused, "forward").exact_integers:
        pytest.skip(f"{able.name} does not promise exact integers")
    x, weight, bias = operands(fused, integers=True)
    x[torch.rand(x.shape) < 0.01] = float("nan")
    if bias is not None:
        bias[-1] = float("nan")
        bias[0] = -float("inf")
    value, code = able.forward_max_pool(fused, x, weight, bias)
    expected, indices = pool_of(fused, activate(fused, convolve(fused, x, weight, bias)))
    expected_code = code_of(fused, indices)
    if fused.activation == "relu":
        expected_code[expected <= 0] = NO_VOXEL
    assert torch.equal(code, expected_code)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=0, equal_nan=True)
    alone = able.max_pool(fused, x, weight, bias)
    torch.testing.assert_close(alone, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gradient", ["grad_input", "grad_weight"])
@pytest.mark.parametrize(("able", "fused"), cases())
def test_gradients_within_bound(able, fused, gradient, guarded_results, poisoned):
    require(able, fused, gradient)
    (grad, code, other), indices, counts = gradient_operands(fused, gradient)
    copies = [tensor.clone() for tensor in (grad, code, other)]
    got, of_bias = gradient_of(able, fused, gradient, (grad, code, other))
    assert got.is_contiguous(memory_format=MEMORY_FORMAT[fused.layout])
    for tensor, copy in zip((grad, code, other), copies, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True, msg="a pass wrote to its argument")
    exact = dense_gradient(fused, gradient, scattered(fused, counts, indices), other)
    magnitude = dense_gradient(fused, gradient, scattered(fused, counts.abs(), indices), other.abs())
    accuracy = able.accuracy(fused, gradient)
    unit = torch.finfo(getattr(torch, accuracy.accumulate_dtype)).eps
    bound = accuracy.constant * unit * fused.reduction_length(gradient) * magnitude
    bound += torch.finfo(grad.dtype).eps * exact.abs()
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= bound).all())
    assert (of_bias is not None) == (gradient == "grad_weight" and fused.bias)
    if of_bias is not None:
        error = (of_bias.double() - counts.double().sum((0, 2, 3, 4))).abs()
        terms = counts[:, 0].numel()
        assert bool((error <= unit * terms * counts.double().abs().sum((0, 2, 3, 4))).all())


@pytest.mark.parametrize("gradient", ["grad_input", "grad_weight"])
@pytest.mark.parametrize(("able", "fused"), cases(["float32"]))
def test_gradients_exact_on_integers(able, fused, gradient, poisoned):
    require(able, fused, gradient)
    operands, indices, counts = gradient_operands(fused, gradient, integers=True)
    got, of_bias = gradient_of(able, fused, gradient, operands)
    assert torch.equal(got.double(), dense_gradient(fused, gradient, scattered(fused, counts, indices), operands[2]))
    if of_bias is not None:
        assert torch.equal(of_bias.double(), counts.double().sum((0, 2, 3, 4)))


@pytest.mark.parametrize(("able", "fused"), cases(["float32"]))
def test_same_bits_for_every_run_and_thread_count(able, fused, pass_, threads):
    require(able, fused, pass_)
    args = operands(fused) if pass_ == "forward" else gradient_operands(fused, pass_)[0]
    run = getattr(able, f"{pass_}_max_pool")
    results = []
    for count in (1, 1, 2, 3):
        threads(count)
        result = run(fused, *args)
        results.append([result] if pass_ == "grad_input" else [part for part in result if part is not None])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_other_backends_name_themselves():
    problem = ConvProblem.parse(f"cpu-float32-ncdhw-{PROBLEMS[0]}")
    x, weight, bias = operands(problem)
    for backend in set(REGISTRY) - set(BACKENDS):
        with pytest.raises(NotImplementedError, match=f"{backend.name} has no fused passes: cpu-float32"):
            backend.forward_max_pool(problem, x, weight, bias)
