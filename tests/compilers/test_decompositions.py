"""The decomposition of every operator computes what the operator does, of fixed and of symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pyvolconv
from pyvolconv import activation_ops, fused_ops, ops
from pyvolconv.epilogue import KEEPS_PREACTIVATION

from ..closeness import assert_close

GEOMETRIES = {
    "plain": ((1, 1, 1), (1, 1, 0, 0, 2, 2), (1, 1, 1), 1),
    "even kernel, same": ((1, 1, 1), (0, 1, 0, 1, 1, 2), (1, 1, 1), 1),
    "more at the beginning": ((2, 1, 2), (2, 0, 1, 0, 1, 1), (1, 2, 1), 2),
    "stride leaves voxels over": ((3, 2, 2), (0, 0, 1, 1, 0, 1), (1, 1, 1), 2),
    "dilation": ((1, 2, 1), (1, 1, 1, 1, 1, 1), (2, 1, 3), 1),
}
POOL = ((2, 2, 2), (2, 2, 2), (0, 0, 0), True)


def operands(geometry, dtype=torch.float64):
    x = torch.randn(2, 4, 7, 8, 9, dtype=dtype)
    weight = torch.randn(6, 4 // geometry[3], 2, 3, 2, dtype=dtype)
    return x, weight, torch.randn(6, dtype=dtype)


def calls(geometry, activation="none"):
    """(operator, arguments) of all, with the geometry and activation."""
    x, weight, bias = operands(geometry)
    size, kernel = list(x.shape[2:]), list(weight.shape[2:])
    y = ops.conv3d(x, weight, bias, *geometry)
    value, code = fused_ops.conv3d_max_pool(x, weight, bias, *geometry, activation, 0.2, *POOL)
    return {
        "conv3d": (ops.conv3d, (x, weight, bias, *geometry)),
        "grad_input": (ops.conv3d_grad_input, (y, weight, size, *geometry)),
        "grad_weight": (ops.conv3d_grad_weight, (y, x, kernel, *geometry)),
        "activation": (activation_ops.conv3d_activation, (x, weight, bias, y.flip(0), *geometry, activation, 0.2)),
        "max_pool": (fused_ops.conv3d_max_pool, (x, weight, bias, *geometry, activation, 0.2, *POOL)),
        "max_pool grad_input": (
            fused_ops.conv3d_max_pool_grad_input,
            (value, code, weight, size, *geometry, *POOL),
        ),
        "max_pool grad_weight": (
            fused_ops.conv3d_max_pool_grad_weight,
            (value, code, x, kernel, True, *geometry, *POOL),
        ),
    }


@pytest.mark.parametrize("name", calls(GEOMETRIES["plain"]))
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_same_results(geometry, name):
    operator, args = calls(geometry)[name]
    assert_close(pyvolconv.decompositions()[operator](*args), operator(*args))


@pytest.mark.parametrize("activation", fused_ops.APPLY)
def test_same_results_of_every_activation(activation):
    for name in ("activation", "max_pool"):
        operator, args = calls(GEOMETRIES["plain"], activation)[name]
        got, expected = pyvolconv.decompositions()[operator](*args), operator(*args)
        if name == "max_pool" and activation in KEEPS_PREACTIVATION:
            # Far below zero such an activation is zero up to rounding: which voxel is the largest there is anybody's.
            got, expected = (fused_ops.APPLY[activation](values, 0.0) for values, _ in (got, expected))
        assert_close(got, expected)


@pytest.mark.parametrize("name", ["max_pool grad_input", "max_pool grad_weight"])
def test_gradients_where_no_voxel_was_chosen(name):
    operator, args = calls(GEOMETRIES["plain"], "relu")[name]
    assert_close(pyvolconv.decompositions()[operator](*args), operator(*args))


@pytest.mark.parametrize("name", calls(GEOMETRIES["plain"]))
@pytest.mark.parametrize("geometry", ["even kernel, same", "stride leaves voxels over"])
def test_graph_of_symbolic_sizes(geometry, name):
    """Torch's operators alone, down to the inner ones, and right for a batch that was not there when traced."""
    operator, args = calls(GEOMETRIES[geometry])[name]
    tensors, rest = (
        [arg for arg in args if isinstance(arg, torch.Tensor)],
        [arg for arg in args if not isinstance(arg, torch.Tensor)],
    )

    def function(*tensors):
        return operator(*tensors, *rest)

    graph = make_fx(function, pyvolconv.decompositions(), tracing_mode="symbolic")(*tensors)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert not {target for target in called if "pyvolconv" in str(target)}
    more = [torch.cat([t, t, t]) if t.dim() == 5 and t.shape[0] == 2 else t for t in tensors]
    assert_close(graph(*more), operator(*more, *rest))
