"""`conv3d_activation` for torch's machinery: compile, trace, autocast, counters, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyvolconv
from pyvolconv import activation_ops, ops
from pyvolconv.cost.operators import operator_cost

from ..closeness import assert_close
from .calls import operands, ours, theirs


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic, activation):
    _, w, b = operands(torch.float32, residual=False)
    compiled = torch.compile(ours(activation), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 4, 6, 5, requires_grad=True)
        r = torch.randn_like(theirs()(x, w, b), requires_grad=True)
        y, expected = compiled(x, w, b, r), theirs(activation)(x, w, b, r)
        assert_close(y, expected)
        cotangent = torch.randn_like(y)
        gradients = [torch.autograd.grad(result, (x, w, b, r), cotangent) for result in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_traced_in_torchs_own_operators():
    args = tuple(arg.detach() for arg in operands(torch.float32))
    traced = torch.jit.trace(ours("silu"), args)
    assert "pyvolconv::" not in str(traced.graph)
    torch.testing.assert_close(traced(*args), theirs("silu")(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """The residual has the dtype of the convolution's result, or torch adds the two."""
    x, w, b, r = operands(torch.float32, integers=True)
    r = r.detach().to(dtype).requires_grad_()
    results = []
    for function in (ours(), theirs()):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, w, b, r)
        results.append((y, *torch.autograd.grad(y.float().sum(), (x, w, b, r))))
    assert results[0][0].dtype == dtype
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), "small integers are exact in bfloat16"


def test_counters():
    """Torch's counter leaves additions out; `cost` counts one for each value of the residual, which is read once."""
    x, w, b, r = operands(torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = ours()(x, w, b, r)
    with FlopCounterMode(display=False) as plain:
        theirs()(x, w, b, r)
    assert counter.get_total_flops() == plain.get_total_flops() > 0
    geometry = ([1, 1, 1], [0, 0, 1, 1, 2, 2], [1, 1, 1], 2)
    y = ops.conv3d(x, w, b, *geometry)
    (alone,) = operator_cost(ops.conv3d, (x, w, b, *geometry), y).works
    for residual in (None, y):
        args = (x, w, b, residual, *geometry, "relu", 0.1)
        (work,) = operator_cost(activation_ops.conv3d_activation, args, y).works
        more = 0 if residual is None else y.numel()
        assert (work.flops - alone.flops, work.min_bytes - alone.min_bytes) == (more, 4 * more)
        assert work.problem == alone.problem


def test_checkpoint():
    args = operands()
    expected = torch.autograd.grad(theirs("silu")(*args).sum(), args)
    y = checkpoint(ours("silu"), *args, use_reentrant=False)
    assert_close(torch.autograd.grad(y.sum(), args), expected)


def test_modes_of_torch_functions_get_every_argument():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((func, set(kwargs or {})))
            return func(*args, **(kwargs or {}))

    args, seen = operands(), []
    expected = ours("leaky_relu")(*args)
    with Mode():
        assert torch.equal(ours("leaky_relu")(*args), expected)
    assert (pyvolconv.conv3d_activation, {"activation", "negative_slope", "residual"}) in seen


def test_subclass_as_residual():
    class Mine(torch.Tensor):
        pass

    x, w, b, r = (arg.detach() for arg in operands())
    y = ours()(x, w, b, r.as_subclass(Mine))
    assert type(y) is Mine
    assert torch.equal(y.as_subclass(torch.Tensor), ours()(x, w, b, r))
    assert F.relu(y).shape == y.shape
