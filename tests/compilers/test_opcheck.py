"""`torch.library.opcheck` of every operator, in both layouts, through every backend, at sizes of the vectorised paths.

Strides are what matters: a fake tensor promises those of whichever backend is chosen later. tests/test_operators.py has
more geometries of the plain passes, in the backend that the cost model takes.
"""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import pyvolconv
from pyvolconv import activation_ops, fused_ops, ops

from .models import FORMATS

BACKENDS = [backend for backend in pyvolconv.backends() if backend.family not in ("triton", "numba")]
GEOMETRY = ([1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1], 1)
POOL = ([2, 2, 2], [2, 2, 2], [0, 0, 0], True)
CHANNELS = {"cpp.first_layer": (1, 16)}
DTYPES = {"cpp.widened": torch.bfloat16, "cpp.bfloat16": torch.bfloat16}
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def calls(backend, layout, activation):
    """(operator, arguments) of all operators."""
    inputs, outputs = CHANNELS.get(backend, (16, 16))
    dtype = DTYPES.get(backend, torch.float32)

    def tensor(*shape):
        return torch.randn(*shape).to(dtype).contiguous(memory_format=layout).requires_grad_()

    x, weight, grad = tensor(2, inputs, 6, 9, 20), tensor(outputs, inputs, 3, 3, 3), tensor(2, outputs, 6, 9, 20)
    bias = torch.randn(outputs).to(dtype).requires_grad_()
    with torch.no_grad():
        value, code = fused_ops.conv3d_max_pool(x, weight, bias, *GEOMETRY, activation, 0.1, *POOL)
    value.requires_grad_()
    size, kernel = list(x.shape[2:]), list(weight.shape[2:])
    return [
        (ops.conv3d, (x, weight, bias, *GEOMETRY)),
        (ops.conv3d_grad_input, (grad, weight, size, *GEOMETRY)),
        (ops.conv3d_grad_weight, (grad, x, kernel, *GEOMETRY)),
        (activation_ops.conv3d_activation, (x, weight, bias, grad, *GEOMETRY, activation, 0.1)),
        (fused_ops.conv3d_max_pool, (x, weight, bias, *GEOMETRY, activation, 0.1, *POOL)),
        (fused_ops.conv3d_max_pool_grad_input, (value, code, weight, size, *GEOMETRY, *POOL)),
        (fused_ops.conv3d_max_pool_grad_weight, (value, code, x, kernel, True, *GEOMETRY, *POOL)),
    ]


def check(operator, args, tests):
    results = opcheck(operator, args, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == len(tests)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_every_backend(name, layout):
    """Of those operators that a backend runs; autograd is left out, which may ask it for a pass that it has not."""
    refused = []
    for operator, args in calls(name, layout, "relu"):
        with pyvolconv.use_backend(name):
            try:
                with torch.no_grad():
                    operator(*args)
            except pyvolconv.UnsupportedProblemError as error:
                refused.append(str(error))
                continue
            check(operator, args, ("test_schema", "test_faketensor"))
    if len(refused) == len(calls(name, layout, "relu")):
        pytest.skip(refused[0])


@pytest.mark.parametrize(("activation", "layout"), [("relu", FORMATS[1]), ("silu", FORMATS[0])])
def test_fused_operators_wholly(activation, layout):
    """With AOTDispatch of dynamic shapes, forward and backward, in the backends that are chosen."""
    for operator, args in calls("", layout, activation)[3:]:
        check(operator, args, (*QUICK, "test_aot_dispatch_dynamic"))
