"""Kernels that apply the activation to results in registers, in Triton's interpreter; see tests/test_triton.py."""

from __future__ import annotations

import pytest
import torch

import pyvolconv
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.triton_base import EpilogueLaunches
from pyvolconv.backends.triton_implicit_gemm import TritonImplicitGemm
from pyvolconv.backends.triton_tma import TritonTma
from pyvolconv.dispatch import choose
from pyvolconv.problem import ConvProblem

from .calls import ACTIVATIONS, CASES, LAYOUTS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = {
    "gather": (TritonImplicitGemm(), ""),
    "gather, many blocks": (TritonImplicitGemm(), "m16n16k16w4s2"),
    "tma": (TritonTma(), "m64n32k16w4s2-1"),
    "tma, many blocks, split sums": (TritonTma(), "m16n16k16w4s2-3"),
}
FEW = [("leaky_relu", True), ("relu", False), ("silu", True)]
"""Of blocks: the activations themselves are one function for all."""


def backend_of(path, problem):
    backend, configuration = PATHS[path]
    moved = "-moved" if backend.name == "triton.tma" and problem.layout == "ncdhw" else ""
    return backend.configured(configuration + moved) if configuration else backend


def tensors(problem, integers=True):
    """x, weight, bias and residual, dense in the problem's layout."""

    def tensor(shape):
        values = torch.randint(-3, 4, shape) if integers else torch.randn(shape)
        dense = values.to(DEVICE, getattr(torch, problem.dtype))
        return dense.contiguous(memory_format=MEMORY_FORMAT[problem.layout]) if dense.dim() == 5 else dense

    shapes = (problem.input_shape, problem.weight_shape, (problem.out_channels,), problem.output_shape)
    return [tensor(shape) for shape in shapes]


def exact(activation, x, weight, bias, residual):
    y = torch.nn.functional.conv3d(*(operand.double() for operand in (x, weight, bias)), padding=1)
    return ACTIVATIONS[activation](y if residual is None else y + residual.double())


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("path", PATHS)
def test_exact_on_integers(require, poisoned, path, layout):
    problem = ConvProblem.parse(f"{DEVICE}-float32-{layout}-n2ic4oc20-i2x3x4-k3-p1-bias")
    backend = backend_of(path, problem)
    require(backend, problem, "forward")
    x, weight, bias, residual = tensors(problem)
    for activation, with_residual in FEW if "many" in path else CASES:
        added = residual if with_residual else None
        got = backend.forward_epilogue(problem, x, weight, bias, added, activation, 0.25)
        expected = exact(activation, x, weight, bias, added)
        assert got.is_contiguous(memory_format=MEMORY_FORMAT[layout])
        if activation in ("none", "relu", "leaky_relu"):
            assert torch.equal(got.double(), expected), activation
        else:
            torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_rounds_once(require, path):
    """Sum, residual and activation are float32: the result is the exact one, rounded to 16 bits."""
    problem = ConvProblem.parse(f"{DEVICE}-float16-ndhwc-n1ic8oc16-i2x3x4-k3-p1-bias")
    backend = backend_of(path, problem)
    require(backend, problem, "forward")
    x, weight, bias, residual = tensors(problem, integers=False)
    for activation in ("silu", "gelu"):
        got = backend.forward_epilogue(problem, x, weight, bias, residual, activation, 0.0)
        expected = exact(activation, x, weight, bias, residual)
        torch.testing.assert_close(got.double(), expected, rtol=2**-11 + 1e-4, atol=1e-4)


def test_nan_and_infinity_pass_as_in_torch(require):
    problem = ConvProblem.parse(f"{DEVICE}-float32-ndhwc-n1ic4oc16-i1x2x4-k1")
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -100.0, 100.0, 1e-30, -1.0])
    x = torch.zeros(problem.input_shape, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.zeros(problem.weight_shape, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
    residual = values.to(DEVICE).view(1, 1, 1, 2, 4).expand(problem.output_shape)
    residual = residual.contiguous(memory_format=torch.channels_last_3d)
    for backend in (TritonImplicitGemm(), TritonTma()):
        require(backend, problem, "forward")
        for activation, function in ACTIVATIONS.items():
            got = backend.forward_epilogue(problem, x, weight, None, residual, activation, 0.25)
            torch.testing.assert_close(got, function(residual), equal_nan=True, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", ["n1ic4oc8-i2x3x4-k3-p1-bias", "n1g4ic4oc4-i2x3x4-k3-p1-bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_function_and_its_gradients(require, layout, sizes):
    """Also by a backend whose kernels know no activation: it is applied to what they wrote."""
    problem = ConvProblem.parse(f"{DEVICE}-float32-{'ndhwc' if layout is LAYOUTS[1] else 'ncdhw'}-{sizes}")
    args = [operand.requires_grad_() for operand in tensors(problem)]
    # The kernels read it where they write the result: it has to be brought into that layout.
    other = next(other for other in LAYOUTS if other != layout)
    args[3] = args[3].detach().contiguous(memory_format=other).requires_grad_()
    options = {"padding": 1, "groups": problem.groups}
    with pyvolconv.use_backend("triton"):
        backend = choose(problem, "forward")
        require(backend, problem, "forward")
        assert isinstance(backend, EpilogueLaunches) == (problem.groups == 1)
        for activation, function in ACTIVATIONS.items():
            y = pyvolconv.conv3d_activation(
                *args[:3], **options, activation=activation, negative_slope=0.25, residual=args[3]
            )
            expected = function(torch.nn.functional.conv3d(*args[:3], **options) + args[3])
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            cotangent = torch.randint(-3, 4, y.shape).to(y)
            gradients = [torch.autograd.grad(result, args, cotangent) for result in (y, expected)]
            # On CUDA torch and these kernels may multiply in TF32, which rounds what a silu passes on.
            tolerance = 1e-4 if DEVICE == "cpu" else 1e-2
            torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * float(gradients[1][1].abs().max()))
