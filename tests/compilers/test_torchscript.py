"""TorchScript of an accelerated model, traced and compiled, is that of the model before: torch's operators alone."""

from __future__ import annotations

import io
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

import pyvolconv

from .models import MODELS, assert_close, pair, sample

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
WAYS = {"script": torch.jit.script, "trace": lambda model: torch.jit.trace(model, sample())}


def saved_and_loaded(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def operators(scripted):
    """How often each operator is called, modules opened up."""
    graph = scripted.inlined_graph
    return Counter(node.kind() for node in graph.findAllNodes("aten::conv3d")) + Counter(
        node.kind() for node in graph.nodes() if not node.kind().startswith("prim::")
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_saved_loaded_and_run(name, way, train):
    """On other sizes than those of the trace, forward and backward."""
    reference, model = pair(name, train=train)
    loaded = saved_and_loaded(WAYS[way](model))
    assert operators(loaded) == operators(WAYS[way](reference)) != Counter()
    for net in (reference, loaded):
        net.train(train)
    x = sample(3, (6, 8, 4))
    y, expected = loaded(x), reference(x)
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    assert_close(
        torch.autograd.grad(y, [parameter for _, parameter in sorted(loaded.named_parameters())], cotangent),
        torch.autograd.grad(expected, [parameter for _, parameter in sorted(reference.named_parameters())], cotangent),
    )


@pytest.mark.parametrize("way", WAYS)
def test_what_is_scripted_or_traced_stays_accelerated(way):
    _, model = pair("code")
    kinds = [type(module) for module in model.modules()]
    WAYS[way](model)
    assert [type(module) for module in model.modules()] == kinds
    assert isinstance(model.conv, pyvolconv.Conv3d)


def test_tracing_warns_no_more_than_before():
    """Sizes that become constants of a trace are warned of."""
    warned = []
    for model in pair("sequential"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.jit.trace(model, sample())
        warned.append(sum(issubclass(warning.category, torch.jit.TracerWarning) for warning in caught))
    assert warned[1] == warned[0]


class Split(nn.Module):
    def forward(self, x):
        return x, x + 1


class Join(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]):
        return pair[0] * pair[1]


def test_a_fused_sequential_hands_on_whatever_its_modules_return():
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2), Split(), Join())
    expected = reference(x := sample())
    scripted = torch.jit.script(pyvolconv.accelerate(reference))
    assert_close(scripted(x), expected)


def test_functions_are_compiled_as_those_of_torch():
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor):
        y = pyvolconv.conv3d(x, w, b, padding="same")
        return pyvolconv.conv_transpose3d(y, w, None, 2, output_padding=1)

    scripted = torch.jit.script(function)
    x, w, b = torch.randn(2, 3, 4, 5, 6), torch.randn(3, 3, 3, 3, 3), torch.randn(3)
    assert_close(scripted(x, w, b), function(x, w, b))
    assert "aten::conv_transpose3d" in str(scripted.graph)


def test_a_traced_fused_function():
    def function(x):
        return pyvolconv.conv3d_max_pool(x, weight, activation="silu", padding=1)

    weight = torch.randn(4, 3, 3, 3, 3)
    traced = torch.jit.trace(function, sample())
    assert "pyvolconv::" not in str(traced.graph)
    x = sample(3)
    assert_close(traced(x), function(x))
