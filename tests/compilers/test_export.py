"""`torch.export` keeps this package's operators; `decompositions()` puts torch's own in their place."""

from __future__ import annotations

import io

import pytest
import torch

import pyvolconv
from pyvolconv import activation_ops, fused_ops, ops

from .models import FORMATS, MODELS, assert_close, pair, sample

BATCH = ({0: torch.export.Dim("batch", min=2, max=16)},)
OURS = {ops.conv3d, ops.conv3d_grad_input, ops.conv3d_grad_weight} | {
    activation_ops.conv3d_activation,
    fused_ops.conv3d_max_pool,
    fused_ops.conv3d_max_pool_grad_input,
    fused_ops.conv3d_max_pool_grad_weight,
}


def targets(program):
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def test_every_operator_has_a_decomposition():
    assert set(pyvolconv.decompositions()) == OURS
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyvolconv::")}
    assert {operator.name() for operator in OURS} == defined


@pytest.mark.parametrize(
    ("name", "strict", "layout"),
    [
        ("sequential", True, FORMATS[0]),
        ("sequential", False, FORMATS[1]),
        ("code", True, FORMATS[1]),
        ("code", False, FORMATS[0]),
    ],
)
def test_with_a_dynamic_batch(name, strict, layout):
    reference, model = pair(name, layout)
    program = torch.export.export(model, (sample(layout=layout),), dynamic_shapes=BATCH, strict=strict)
    assert {ops.conv3d_grad_input, fused_ops.conv3d_max_pool} <= targets(program)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    elsewhere = program.run_decompositions(pyvolconv.decompositions())
    assert not targets(elsewhere) & OURS
    assert torch.ops.aten.convolution.default in targets(elsewhere)
    for batch in (2, 5):
        x = sample(batch, layout=layout)
        expected = reference(x)
        for one in (program, torch.export.load(buffer), elsewhere):
            assert_close(one.module()(x), expected)
        buffer.seek(0)


@pytest.mark.parametrize("name", MODELS)
def test_training_program(name):
    """Exported in training mode, and trained."""
    reference, model = pair(name, train=True)
    program = torch.export.export(model, (sample(),))
    x = sample()
    cotangent = torch.randn_like(expected := reference(x))
    net = program.module()
    gradients = [
        torch.autograd.grad(y, list(m.parameters()), cotangent) for y, m in ((net(x), net), (expected, reference))
    ]
    assert_close(*gradients)
