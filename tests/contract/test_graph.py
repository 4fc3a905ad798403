"""The autograd graph of a call: what is refused, kept, shown to hooks and freed, beside torch's."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch import nn

from .layers import assert_same_outcome, outcome, pair


@pytest.fixture
def layers(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    for key, value in list(theirs.named_parameters()):
        # Both fresh, so that their version counters agree.
        setattr(ours, key, nn.Parameter(value.detach().clone()))
        setattr(theirs, key, nn.Parameter(value.detach().clone()))
    return ours, theirs


def change_weight(layer, x):
    y = layer(x * 2)
    with torch.no_grad():
        layer.weight.mul_(2)
    y.sum().backward()


def change_input(layer, x):
    x = x * 2
    y = layer(x)
    x.add_(1)
    y.sum().backward()


def change_result(layer, x):
    y = layer(x * 2)
    y.relu_()
    y.sum().backward()
    return x.grad


def change_bias(layer, x):
    y = layer(x * 2)
    with torch.no_grad():
        layer.bias.mul_(2)
    y.sum().backward()
    return x.grad


def go_back_twice(layer, x):
    y = layer(x).sum()
    y.backward()
    y.backward()


def retain(layer, x):
    y = layer(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    return x.grad


def wrong_cotangent(layer, x):
    layer(x).backward(torch.ones(1, 6, 1, 1, 1))


def no_cotangent(layer, x):
    layer(x).backward()


def write_into_leaf(layer, x):
    layer.weight.mul_(2)


def change_inference_tensor(layer, x):
    with torch.inference_mode():
        y = layer(x)
    return y * layer.weight.sum()


WAYS = [change_weight, change_input, change_result, change_bias, go_back_twice, retain, wrong_cotangent, no_cotangent]
WAYS += [write_into_leaf, change_inference_tensor]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_errors_and_results(layers, way):
    x = torch.randn(1, 4, 5, 5, 5)
    got, expected = (outcome(way, layer, x.clone().requires_grad_()) for layer in layers)
    if isinstance(expected, RuntimeError):
        got, expected = (_without_node_name(error) for error in (got, expected))
    assert_same_outcome(got, expected)


def _without_node_name(error):
    """Words that name the node: torch's is ConvolutionBackward0."""
    for name in ("BilinearFunctionBackward", "ConvolutionBackward0", "AddBackward0"):
        error = type(error)(str(error).replace(name, "the node"))
    return error


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_what_is_differentiated(layers, wanted):
    results = []
    for layer in layers:
        x = torch.ones(1, 4, 5, 5, 5).requires_grad_(wanted[0])
        layer.weight.requires_grad_(wanted[1])
        layer.bias.requires_grad_(wanted[2])
        y = layer(x)
        if any(wanted):
            y.sum().backward()
        results.append([y.requires_grad, y.is_leaf, *(leaf.grad is None for leaf in (x, *layer.parameters()))])
    assert results[0] == results[1]
    assert results[0][2:] == [not any_ for any_ in wanted]


def test_hooks_of_tensors_and_parameters(layers):
    seen = []
    for layer in layers:
        events = []
        x = torch.randn(1, 4, 5, 5, 5, requires_grad=True)
        layer.weight.register_hook(lambda grad, events=events: events.append(("weight", grad.shape)))
        layer.weight.register_post_accumulate_grad_hook(
            lambda leaf, events=events: events.append(leaf.grad is not None)
        )
        x.register_hook(lambda grad, events=events: events.append(("x", grad.shape)))
        y = layer(x)
        y.register_hook(lambda grad, events=events: events.append(("y", grad.shape)))
        y.sum().backward()
        seen.append(events)
    assert sorted(map(str, seen[0])) == sorted(map(str, seen[1]))
    assert seen[0][0] == seen[1][0]


def test_anomaly_detection(layers):
    for layer in layers:
        x = torch.randn(1, 4, 5, 5, 5, requires_grad=True)
        with torch.autograd.set_detect_anomaly(True):
            layer(x).sum().backward()
            y = layer(x)
            with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
                (y * torch.inf).sub(torch.inf).mul(0).sum().backward()


def test_nothing_outlives_a_call(layers):
    """Neither an input nor a result is kept once the caller has let go of them, not even in a circle."""
    for layer in layers:
        x = torch.randn(1, 4, 5, 5, 5, requires_grad=True)
        y = layer(x)
        kept = [weakref.ref(x), weakref.ref(y)]
        y.sum().backward()
        del x, y
        assert [reference() for reference in kept] == [None, None]


def test_the_node_has_another_name(layers):
    """A difference, which matters to what reads the graph: its edges are those of torch."""
    x = torch.randn(1, 4, 5, 5, 5)
    ours, theirs = layers
    assert theirs(x).grad_fn.name() == "ConvolutionBackward0"
    assert ours(x).grad_fn.name() == ("BilinearFunctionBackward" if isinstance(ours, nn.Conv3d) else "AddBackward0")
    leaves = []
    for layer in layers:
        found, nodes = set(), [layer(x).grad_fn]
        while nodes:
            node = nodes.pop()
            found.add(id(node.variable)) if hasattr(node, "variable") else None
            nodes += [following for following, _ in node.next_functions if following is not None]
        leaves.append(found == {id(parameter) for parameter in layer.parameters()})
    assert leaves == [True, True]
