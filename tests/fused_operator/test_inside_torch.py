"""`conv3d_max_pool` for torch's machinery: opcheck, compile, autocast, FLOP counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pyvolconv import fused_ops

from ..closeness import assert_close
from .calls import (
    GEOMETRY,
    operands,
    ours,
    theirs,
)


def sizes(activation="relu"):
    return ([1, 2, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1], 2, activation, 0.2, [2, 2, 2], [2, 2, 2], [0, 0, 0], True)


@pytest.mark.parametrize(
    ("activation", "layout"), [("relu", torch.channels_last_3d), ("silu", torch.contiguous_format)]
)
def test_opcheck(activation, layout):
    x, w, b = operands(torch.float32, layout=layout)
    torch.library.opcheck(fused_ops.conv3d_max_pool, (x, w, b, *sizes(activation)))
    value, code = fused_ops.conv3d_max_pool(x, w, b, *sizes(activation))
    value, rest = value.detach().requires_grad_(), (*sizes()[:4], *sizes()[6:])
    torch.library.opcheck(fused_ops.conv3d_max_pool_grad_input, (value, code, w, list(x.shape[2:]), *rest))
    torch.library.opcheck(fused_ops.conv3d_max_pool_grad_weight, (value, code, x, list(w.shape[2:]), True, *rest))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    x, w, b = operands(torch.float32)
    compiled = torch.compile(ours("silu"), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 4, 6, 5, requires_grad=True)
        y, expected = compiled(x, w, b), theirs("silu")(x, w, b)
        assert_close(y, expected)
        cotangent = torch.randn_like(y)
        assert_close(torch.autograd.grad(y, (x, w, b), cotangent), torch.autograd.grad(expected, (x, w, b), cotangent))


def test_autocast():
    x, w, b = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours()(x, w, b), theirs()(x, w, b)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_flop_counter():
    """What the definition takes, as torch counts it; also of gradients, which visit chosen voxels only."""
    x, w, b = operands()
    with FlopCounterMode(display=False) as counter:
        y = ours()(x, w, b)
    with FlopCounterMode(display=False) as plain:
        F.conv3d(x, w, b, **GEOMETRY)
    assert counter.get_total_flops() == plain.get_total_flops() > 0
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * plain.get_total_flops()
