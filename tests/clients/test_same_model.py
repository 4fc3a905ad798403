"""To whoever asks, an accelerated network of others is the network that it was; `revert` makes it that."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyvolconv

pytestmark = pytest.mark.clients
CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
OURS = (pyvolconv.Conv3d, pyvolconv.ConvTranspose3d)


def kinds_in(model):
    return list(dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__))


def description(model, kinds):
    """Whatever code that looks for kinds of modules, names, parameters or attributes can find."""
    return {
        "text": repr(model),
        "modules": [(name, id(module), type(module).__name__) for name, module in model.named_modules()],
        "counts": [sum(isinstance(module, kind) for module in model.modules()) for kind in kinds],
        "places": [(type(module).__module__, type(module).__qualname__) for module in model.modules()],
        "attributes": [set(vars(module)) for module in model.modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "state": list(model.state_dict()),
    }


@pytest.fixture
def network(client):
    return client.build()


@pytest.fixture
def infer(network):
    def call(model):
        with torch.no_grad():
            return network(model.eval(), network.inputs)

    return call


def is_ours(model):
    return [isinstance(module, OURS) for module in model.modules() if isinstance(module, CONVOLUTIONS)]


def test_everything_but_the_arithmetic_is_what_it_was(network, infer):
    model, kinds = network.model, kinds_in(network.model)
    classes = [type(module) for module in model.modules()]
    expected, before = infer(model), description(model, kinds)
    assert pyvolconv.accelerate(model) is model
    assert is_ours(model)
    assert all(is_ours(model))
    assert description(model, kinds) == before
    assert infer(model).shape == expected.shape
    assert description(model, kinds) == before, "running it leaves nothing in it"

    assert pyvolconv.revert(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert description(model, kinds) == before
    assert torch.equal(infer(model), expected)


class Convolutions(TorchDispatchMode):
    """Counts the 3-D convolutions that torch's operators and this package's are asked for."""

    def __init__(self):
        super().__init__()
        self.torch = self.ours = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.torch += name == "aten::convolution" and args[1].dim() == 5
        self.ours += name.startswith("pyvolconv::conv3d")
        return function(*args, **(kwargs or {}))


def test_every_convolution_is_computed_here(network, infer):
    with Convolutions() as before:
        infer(network.model)
    pyvolconv.accelerate(network.model)
    with pyvolconv.use_backend("cpp"), Convolutions() as after:
        infer(network.model)
    assert before.torch > 0
    assert (after.torch, after.ours) == (0, before.torch)


def test_flops_are_still_counted(network, infer):
    with FlopCounterMode(display=False) as before:
        infer(network.model)
    pyvolconv.accelerate(network.model)
    with FlopCounterMode(display=False) as after:
        infer(network.model)
    assert before.get_total_flops() > 0
    assert after.get_total_flops() == before.get_total_flops()


def test_a_deepcopy_is_accelerated_and_independent(network, infer):
    model = pyvolconv.accelerate(network.model)
    expected = infer(model)
    other = copy.deepcopy(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(infer(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(infer(model), expected)
    assert not any(is_ours(pyvolconv.revert(other)))
    assert all(is_ours(model))


def pickled(model):
    """What pickle writes, or the error of a network that cannot be pickled: some keep a lambda."""
    try:
        return pickle.dumps(model), None
    except (AttributeError, pickle.PicklingError) as error:
        return None, (type(error), str(error))


def test_a_pickle_holds_the_original(network, infer):
    model = network.model
    expected, (original, refusal) = infer(model), pickled(model)
    classes = [type(module) for module in model.modules()]
    text, same_refusal = pickled(pyvolconv.accelerate(model))
    assert all(is_ours(model)), "writing must not change what is written"
    assert same_refusal == refusal
    assert (text is None) == (original is None)
    if text is None:
        return
    assert b"pyvolconv" not in text
    other = pickle.loads(text)
    assert [type(module) for module in other.modules()] == classes
    assert torch.equal(infer(other), expected)
