"""A mapped call is one call of the operator for all samples: no loop, and no warning that there is one."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from .cases import FUNCTIONS, Called, operands, sample

NAMES = ("conv3d", "conv_transpose3d", "conv3d_activation", "conv3d_max_pool", "leaky_relu", "silu")
SAMPLES = 5


def calls(function, *args):
    """How often each operator ran; torch warns where it loops over samples, which is an error here."""
    with warnings.catch_warnings(), Called() as called:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit")
        function(*args)
    assert called.times
    return called.times


def mapped(tensors, in_dims):
    return [
        tensor if dim is None else torch.stack([tensor * (n + 1) for n in range(SAMPLES)], dim)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def functions_of(name):
    """The function itself, and all that torch.func makes of it."""
    ours, _ = FUNCTIONS[name]

    def value(*args):
        return ours(*args, groups=2, padding=1) if name != "conv_transpose3d" else ours(*args, stride=2)

    def loss(*args):
        return value(*args).pow(3).sum()

    return {
        "value": value,
        "gradient": grad(loss, (0, 1, 2)),
        "tangent": lambda *args: jvp(value, args, args),
        "tangent of the gradient": lambda *args: jvp(grad(loss, (0, 1, 2)), args, args),
        "gradient of the gradient": lambda *args: grad(lambda x, w, b: grad(loss)(x, w, b).pow(2).sum(), (0, 1, 2))(
            *args
        ),
    }


def operands_of(name):
    x, w, b = operands(requires_grad=False)
    return (x, w, b) if name == "conv_transpose3d" else (x, w[:, :2].contiguous(), b)


IN_DIMS = [dims for dims in itertools.product([None, 0], repeat=3) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_many_calls_for_all_samples_as_for_one(name, in_dims):
    one = operands_of(name)
    several = mapped(one, in_dims)
    for what, function in functions_of(name).items():
        assert calls(vmap(function, in_dims), *several) == calls(function, *one), what


@pytest.mark.parametrize("name", NAMES)
def test_jacobians_and_hessians_take_as_many_calls_for_any_number_of_entries(name):
    ours, _ = FUNCTIONS[name]
    x, w, b = operands(requires_grad=False, channels=2)
    w = w[:, :, :1, :1].contiguous()

    def value(w, x):
        return ours(x, w, b).tanh()

    def total(w, x):
        return value(w, x).pow(3).sum()

    for matrix in (jacrev(value), jacfwd(value), hessian(total), jacfwd(jacfwd(total)), jacrev(jacrev(total))):
        assert calls(matrix, w, x[:1]) == calls(matrix, w, torch.cat([x, x]))


def test_gradients_of_samples_of_a_model_take_one_call_per_layer_and_gradient(pair):
    model, _ = pair
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).pow(2).sum()

    x = sample(7, 1, 2, 4, 4, 4)
    whole = calls(grad(loss), parameters, x[:, 0])
    assert calls(vmap(grad(loss), (None, 0)), parameters, x) == whole
