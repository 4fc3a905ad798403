"""Derivatives of every order and torch.func transforms, against finite differences and against torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import pyvolconv

from .closeness import assert_close

FUNCTIONS = {
    "conv3d": (
        pyvolconv.conv3d,
        F.conv3d,
        [
            {"padding": 1},
            {"stride": (1, 2, 1), "padding": (1, 0, 1), "dilation": (2, 1, 1), "groups": 2},
            {"padding": "same"},
            {"stride": 3, "groups": 4},
        ],
    ),
    "conv_transpose3d": (
        pyvolconv.conv_transpose3d,
        F.conv_transpose3d,
        [
            {"padding": 1},
            {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
            {"stride": (1, 2, 1), "dilation": (3, 1, 2), "output_padding": (2, 1, 1)},
        ],
    ),
}
CASES = [
    pytest.param(ours, theirs, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name, (ours, theirs, several) in FUNCTIONS.items()
    for options in several
]
BACKENDS = ("cpp.direct", "numba", "im2col")


def tensors(ours, options, size=(4, 5, 4), channels=4, dtype=torch.float64):
    groups = options.get("groups", 1)
    shape = (8, channels // groups) if ours is pyvolconv.conv3d else (channels, 8 // groups)
    x = torch.randn(2, channels, *size, dtype=dtype)
    return x, torch.randn(*shape, 2, 3, 2, dtype=dtype), torch.randn(8, dtype=dtype)


def with_grad(*several):
    return tuple(tensor.requires_grad_() for tensor in several)


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_gradcheck(ours, theirs, options):
    args = with_grad(*tensors(ours, options))
    assert gradcheck(
        lambda *args: ours(*args, **options),
        args,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_gradgradcheck(ours, theirs, options):
    args = with_grad(*tensors(ours, options, size=(3, 3, 3)))
    assert gradgradcheck(
        lambda *args: ours(*args, **options),
        args,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_gradcheck_in_full_of_every_hand_written_backend(name, layout):
    x, w, b = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 1, 2, 2, 2), torch.randn(2)
    x = x.double().contiguous(memory_format=layout)
    args = with_grad(x, w.double().contiguous(memory_format=layout), b.double())
    with pyvolconv.use_backend(name):
        assert gradcheck(lambda *args: pyvolconv.conv3d(*args, stride=2, padding=1, groups=2), args)
        assert gradgradcheck(lambda *args: pyvolconv.conv3d(*args, stride=2, padding=1, groups=2), args)


@pytest.mark.parametrize("wanted", [which for which in itertools.product([False, True], repeat=3) if any(which)])
@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_gradients_of_any_subset_of_the_operands(ours, theirs, options, wanted):
    args = tensors(ours, options)
    for arg, want in zip(args, wanted, strict=True):
        arg.requires_grad_(want)
    inputs = [arg for arg, want in zip(args, wanted, strict=True) if want]
    y, expected = ours(*args, **options), theirs(*args, **options)
    cotangent = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


def scalar(function, options):
    """Cubic, so that second derivatives are neither zero nor constant."""
    return lambda *args: (function(*args, **options) ** 3).sum()


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(grad)": lambda f, arg: jacrev(grad(f, arg), arg),
    "jacfwd(grad)": lambda f, arg: jacfwd(grad(f, arg), arg),
    "jacrev(jacfwd)": lambda f, arg: jacrev(jacfwd(f, arg), arg),
    "jacfwd(jacfwd)": lambda f, arg: jacfwd(jacfwd(f, arg), arg),
    "jacrev(jacrev)": lambda f, arg: jacrev(jacrev(f, arg), arg),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("arg", [0, 1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_transforms(name, arg, transform):
    ours, theirs, _ = FUNCTIONS[name]
    options = {"stride": (1, 2, 1), "padding": (1, 0, 1), "groups": 2}
    x, w, b = torch.randn(1, 2, 2, 3, 2), torch.randn(2, 1, 2, 1, 2), torch.randn(2)
    args = (x.double(), w.double(), b.double())
    apply = TRANSFORMS[transform]
    assert_close(apply(scalar(ours, options), arg)(*args), apply(scalar(theirs, options), arg)(*args))


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_mixed_second_derivatives(ours, theirs, options):
    args = tensors(ours, options, size=(3, 3, 3))

    def mixed(function):
        gradients = grad(scalar(function, options), (0, 1, 2))
        tangents = tuple(torch.ones_like(arg) for arg in args)
        return jvp(gradients, args, tangents)[1], vjp(gradients, *args)[1](tangents)

    assert_close(mixed(ours), mixed(theirs))


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_forward_mode_with_any_subset_of_tangents(ours, theirs, options):
    args = tensors(ours, options)
    for wanted in itertools.product([False, True], repeat=3):
        tangents = tuple(torch.randn_like(arg) if want else None for arg, want in zip(args, wanted, strict=True))

        def tangent_of(function, tangents=tangents):
            with torch.autograd.forward_ad.dual_level():
                duals = [
                    arg if tangent is None else torch.autograd.forward_ad.make_dual(arg, tangent)
                    for arg, tangent in zip(args, tangents, strict=True)
                ]
                return torch.autograd.forward_ad.unpack_dual(function(*duals, **options))

        primal, tangent = tangent_of(ours)
        expected_primal, expected_tangent = tangent_of(theirs)
        assert_close(primal, expected_primal)
        assert_close(tangent, expected_tangent)
        assert (tangent is None) == (not any(wanted))


def test_linearize():
    x, w = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64), torch.randn(3, 2, 3, 3, 3, dtype=torch.float64)
    y, push = linearize(lambda w: pyvolconv.conv3d(x, w).sin(), w)
    tangent = torch.randn_like(w)
    expected = jvp(lambda w: F.conv3d(x, w).sin(), (w,), (tangent,))
    assert_close((y, push(tangent)), expected)


IN_DIMS = [dims for dims in itertools.product([None, 0, -1], repeat=3) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_vmap_over_every_combination_of_operands(ours, theirs, options, in_dims):
    mapped = []
    for several, dim in zip(
        zip(*[tensors(ours, options, (3, 4, 3)) for _ in range(3)], strict=True), in_dims, strict=True
    ):
        mapped.append(several[0] if dim is None else torch.stack(several, dim))
    pairs = [(ours, theirs)]
    pairs += [(grad(scalar(ours, options), arg), grad(scalar(theirs, options), arg)) for arg in range(3)]
    for index, (got, expected) in enumerate(pairs):
        keywords = options if index == 0 else {}
        assert_close(
            vmap(lambda *args, f=got, k=keywords: f(*args, **k), in_dims)(*mapped),
            vmap(lambda *args, f=expected, k=keywords: f(*args, **k), in_dims)(*mapped),
        )


def test_nested_vmap():
    x, w = torch.randn(2, 3, 1, 4, 4, 5, 4).double(), torch.randn(3, 2, 6, 2, 2, 2, 2).double()

    def twice(function):
        inner = vmap(lambda x, w: function(x, w, stride=2, groups=2), (0, 0))
        return vmap(inner, (0, 1))(x, w)

    assert_close(twice(pyvolconv.conv3d), twice(F.conv3d))


def test_per_sample_gradients_of_a_network():
    theirs = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.ConvTranspose3d(4, 2, 2, 2)
    ).double()
    samples = torch.randn(5, 1, 4, 4, 4, dtype=torch.float64)
    parameters = dict(theirs.named_parameters())

    def loss(parameters, sample):
        return functional_call(theirs, parameters, (sample[None],)).pow(2).sum()

    expected = vmap(grad(loss), (None, 0))(parameters, samples)
    pyvolconv.accelerate(theirs)
    assert_close(vmap(grad(loss), (None, 0))(parameters, samples), expected)


def test_create_graph_and_third_derivative():
    def third(function):
        x = torch.linspace(-1, 1, 2 * 27, dtype=torch.float64).view(1, 2, 3, 3, 3).requires_grad_()
        w = torch.linspace(1, -1, 16, dtype=torch.float64).view(1, 2, 2, 2, 2).requires_grad_()
        value = (function(x, w) ** 4).sum()
        for target in (x, w, x):
            (gradient,) = torch.autograd.grad(value, target, create_graph=True)
            value = (gradient**2).sum()
        return value

    assert_close(third(pyvolconv.conv3d), third(F.conv3d))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_bias_gradient_is_the_exact_sum(memory_format):
    """gradcheck allows a part in a thousand; integers allow nothing."""
    x = torch.randint(-4, 5, (3, 2, 5, 4, 6)).float().to(memory_format=memory_format)
    weight = torch.randint(-4, 5, (7, 2, 3, 3, 3)).float()
    bias = torch.zeros(7, requires_grad=True)
    y = pyvolconv.conv3d(x, weight, bias, padding=1)
    grad = torch.randint(-4, 5, y.shape).float()
    y.backward(grad)
    assert torch.equal(bias.grad, grad.sum((0, 2, 3, 4)))
