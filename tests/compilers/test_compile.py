"""`torch.compile` of whole models: one graph, one compilation for all sizes, results and gradients as without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import pyvolconv

from .models import FORMATS, assert_close, pair, sample

pytestmark = pytest.mark.usefixtures("fresh_compiler")
# The first batch is no size of a weight: dynamic shapes take equal sizes for the same one.
SIZES = ((5, (8, 6, 10)), (7, (12, 10, 8)), (4, (6, 14, 8)))


def run(model, x, cotangent=None):
    """The result, and in training the gradients of the input and of every parameter."""
    if cotangent is None:
        with torch.no_grad():
            return [model(x)]
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], cotangent)]


def assert_same_run(got, expected):
    """Gradients in front of a norm are small differences of sums as large as the largest of them."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=max(1e-4, 3e-5 * float(other.abs().max())))


@pytest.mark.parametrize(
    ("name", "layout", "train"),
    [
        ("sequential", torch.contiguous_format, True),
        ("sequential", torch.channels_last_3d, False),
        ("code", torch.channels_last_3d, True),
    ],
)
def test_one_graph_for_all_sizes(name, layout, train):
    """`fullgraph` raises where a graph breaks; torch's own model tells how often AOTAutograd has to compile."""
    reference, model = pair(name, layout, train)
    counts = []
    for net in (reference, model):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
        for batch, size in SIZES:
            x = sample(batch, size, layout)
            expected = reference(x)
            cotangent = torch.randn_like(expected) if train else None
            got, wanted = run(compiled, x, cotangent), run(reference, x, cotangent)
            assert got[0].stride() == wanted[0].stride()
            assert_same_run(got, wanted)
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0] < len(SIZES), "compiled anew for another size"


@pytest.mark.parametrize(("name", "train"), [("sequential", False), ("code", True)])
def test_no_graph_break_is_explained(name, train):
    _, model = pair(name, train=train)
    explained = torch._dynamo.explain(model)(sample())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("layout", FORMATS)
def test_modules_and_functions_in_one_graph(layout):
    """The drop-in module with every padding mode, and the transposed function with a result size of its own."""
    layers = [pyvolconv.Conv3d(3, 3, 3, padding=1, padding_mode=mode) for mode in ("zeros", "circular", "replicate")]
    up = pyvolconv.ConvTranspose3d(3, 2, 3, stride=2, padding=1)
    weight = torch.randn(2, 3, 2, 2, 2)

    def function(x, call, transposed):
        for layer in layers:
            x = x + layer(x)
        x = up(x, output_size=[2 * axis for axis in x.shape[2:]])
        return call(transposed(x, weight, stride=2, groups=2), weight.transpose(0, 1).repeat(1, 3, 1, 1, 1))

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch, size in SIZES:
        x = sample(batch, size, layout)
        assert_close(
            compiled(x, pyvolconv.conv3d, pyvolconv.conv_transpose3d), function(x, F.conv3d, F.conv_transpose3d)
        )
    assert counter.frame_count == 1


def test_inductor_trains_a_fused_model():
    """The default compiler, which relies on the strides that fake tensors promise."""
    reference, model = pair("code", torch.channels_last_3d, train=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = sample(batch, layout=torch.channels_last_3d)
        cotangent = torch.randn_like(reference(x))
        assert_same_run(run(compiled, x, cotangent), run(reference, x, cotangent))
