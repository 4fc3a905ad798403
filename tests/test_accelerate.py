"""`accelerate` swaps the arithmetic of a model and nothing else; `revert` undoes it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.errors import UnsupportedProblemError

from .closeness import assert_close


class CausalConv3d(nn.Conv3d):
    """As in video autoencoders: changes self.padding after construction, pads by itself, calls super().forward."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._causal = (self.padding[2],) * 2 + (self.padding[1],) * 2 + (2 * self.padding[0], 0)
        self.padding = (0, 0, 0)

    def forward(self, x, cache=None):
        padding = list(self._causal)
        if cache is not None:
            x = torch.cat([cache, x], 2)
            padding[4] -= cache.shape[2]
        return super().forward(F.pad(x, padding))


class ScaledConv3d(nn.Conv3d):
    """Overrides the hook below forward, and keeps torch's arithmetic reachable through super()."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1, padding_mode="replicate")
        self.causal = CausalConv3d(4, 4, 3, padding=1)
        self.blocks = nn.Sequential(
            OrderedDict(scaled=ScaledConv3d(4, 4, 1), act=nn.ReLU(), up=nn.ConvTranspose3d(4, 2, 2, 2))
        )
        self.flat = nn.Conv2d(2, 2, 1)
        self.shared = self.causal

    def forward(self, x):
        x = self.blocks(self.shared(self.causal(self.stem(x))))
        return self.flat(x.flatten(0, 0).flatten(2, 3))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 1, 4, 5, 6)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)]


def is_ours(module):
    return isinstance(module, pyvolconv.Conv3d | pyvolconv.ConvTranspose3d)


def ran(function):
    """The passes of problems that went through the dispatcher while `function` ran."""
    dispatch.forget_choices()
    function()
    return dispatch._choose.cache_info().currsize


def test_nothing_but_the_arithmetic_changes(net, x):
    before = {name: (id(module), type(module), repr(module)) for name, module in net.named_modules()}
    parameters = {name: id(parameter) for name, parameter in net.named_parameters()}
    state = {name: set(vars(module)) for name, module in net.named_modules()}
    expected = net(x)
    assert ran(lambda: net(x)) == 0

    assert pyvolconv.accelerate(net) is net
    assert_close(net(x), expected)
    assert ran(lambda: net(x)) == 4
    assert len(convolutions(net)) == 4
    for name, module in net.named_modules():
        identity, kind, text = before[name]
        assert (id(module), repr(module)) == (identity, text)
        assert isinstance(module, kind)
        assert is_ours(module) == isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
        assert set(vars(module)) == state[name]
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == parameters

    assert pyvolconv.revert(net) is net
    assert {name: (id(m), type(m), repr(m)) for name, m in net.named_modules()} == before
    assert ran(lambda: net(x)) == 0
    assert torch.equal(net(x), expected)


def test_gradients(net, x):
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    pyvolconv.accelerate(net)
    got = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_twice_is_once(net):
    kinds = [type(module) for module in pyvolconv.accelerate(net).modules()]
    assert [type(module) for module in pyvolconv.accelerate(net).modules()] == kinds
    pyvolconv.revert(pyvolconv.revert(net))
    assert not any(map(is_ours, net.modules()))


def test_our_own_modules_stay_ours():
    layer = pyvolconv.Conv3d(1, 2, 3)
    pyvolconv.revert(pyvolconv.accelerate(layer))
    assert type(layer) is pyvolconv.Conv3d


def test_a_bare_module_and_one_without_convolutions(x):
    layer = nn.Conv3d(1, 2, 3)
    expected = layer(x)
    assert_close(pyvolconv.accelerate(layer)(x), expected)
    linear = nn.Linear(3, 3)
    assert type(pyvolconv.accelerate(linear)) is nn.Linear


@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(3), [nn.Conv3d(1, 1, 1)]])
def test_takes_a_module(wrong):
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got"):
        pyvolconv.accelerate(wrong)


@pytest.mark.parametrize("shape", [(2, 1, 9, 9, 9), [2, 1, 9, 9, 9], torch.Size([2, 1, 9, 9, 9])])
def test_takes_no_shape_for_an_example(shape):
    layer = nn.Conv3d(1, 2, 3)
    with pytest.raises(TypeError, match=r"the numbers .*2, 1, 9, 9, 9.*; give torch.randn"):
        pyvolconv.accelerate(layer, shape)
    assert type(layer) is nn.Conv3d


def test_subclass_with_feature_cache(x):
    layer = CausalConv3d(1, 3, 3, padding=1)
    cache = torch.randn(2, 1, 2, 5, 6)
    expected = layer(x), layer(x, cache)
    pyvolconv.accelerate(layer)
    assert ran(lambda: layer(x)) == 1
    assert_close((layer(x), layer(x, cache)), expected)
    assert sum(isinstance(m, CausalConv3d) for m in nn.Sequential(layer).modules()) == 1
    layer.padding = (0, 1, 1)
    assert layer(x).shape == (2, 3, 4, 7, 8)


def test_deepcopy_keeps_the_acceleration(net, x):
    pyvolconv.accelerate(net)
    other = copy.deepcopy(net)
    assert [type(m) for m in other.modules()] == [type(m) for m in net.modules()]
    assert other.shared is other.causal
    assert torch.equal(other(x), net(x))
    with torch.no_grad():
        other.stem.weight.zero_()
    assert net.stem.weight.count_nonzero() > 0
    assert not any(map(is_ours, pyvolconv.revert(other).modules()))
    assert sum(map(is_ours, net.modules())) == 4


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_holds_the_original_classes(protocol):
    model = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ConvTranspose3d(2, 1, 2))
    x = torch.randn(1, 1, 3, 4, 5)
    expected = model(x)
    text = pickle.dumps(pyvolconv.accelerate(model), protocol)
    assert b"pyvolconv" not in text
    other = pickle.loads(text)
    assert [type(m) for m in other] == [nn.Conv3d, nn.ConvTranspose3d]
    assert_close(other(x), expected)
    assert sum(map(is_ours, model)) == 2, "writing must not change what is written"


def test_torch_save_and_state_dict(tmp_path, net, x):
    plain = copy.deepcopy(net)
    keys = list(net.state_dict())
    pyvolconv.accelerate(net)
    assert list(net.state_dict()) == keys
    torch.save(net.state_dict(), tmp_path / "state.pt")
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert_close(plain(x), net(x))
    net.load_state_dict(plain.state_dict(), strict=True)


def test_hooks_fire(x):
    layer, seen = nn.Conv3d(1, 2, 3), []
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    pyvolconv.accelerate(layer)(x).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_instance_forward_override_stays(x):
    layer = nn.Conv3d(1, 2, 3)
    layer.forward = lambda x: "mine"
    assert pyvolconv.accelerate(layer)(x) == "mine"


def double(module):
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(module, "weight", Double())
    return module


@pytest.mark.parametrize("accelerate_first", [False, True])
@pytest.mark.parametrize(
    "change", [weight_norm, spectral_norm, double, lambda module: prune.l1_unstructured(module, "weight", 0.5)]
)
def test_reparametrised_weights(change, accelerate_first, x):
    layer = nn.Conv3d(1, 3, 3).eval()
    other = copy.deepcopy(layer)
    torch.manual_seed(3)
    expected = change(other)(x)
    torch.manual_seed(3)
    layer = change(pyvolconv.accelerate(layer)) if accelerate_first else pyvolconv.accelerate(change(layer))
    assert_close(layer(x), expected)
    assert ran(lambda: layer(x)) == 1
    if not parametrize.is_parametrized(layer):
        return
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(layer)
    assert_close(copy.deepcopy(layer)(x), expected)
    pyvolconv.revert(layer)
    assert ran(lambda: layer(x)) == 0
    assert_close(layer(x), expected)
    pyvolconv.accelerate(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert ran(lambda: layer(x)) == 1
    assert_close(layer(x), expected)
    assert type(pyvolconv.revert(layer)) is nn.Conv3d


def test_fx_keeps_call_module_nodes(x):
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.ConvTranspose3d(2, 1, 2))
    expected = [node.op for node in fx.symbolic_trace(model).graph.nodes]
    graph = fx.symbolic_trace(pyvolconv.accelerate(model))
    assert [node.op for node in graph.graph.nodes] == expected
    assert expected.count("call_module") == 3
    assert_close(graph(x), model(x))


def test_fx_traces_through_a_users_subclass(x):
    model = nn.Sequential(ScaledConv3d(1, 2, 3), pyvolconv.ConvTranspose3d(2, 1, 2), pyvolconv.Conv3d(1, 1, 1))
    graph = fx.symbolic_trace(pyvolconv.accelerate(model))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(pyvolconv.conv3d) == 2
    assert called.count(pyvolconv.conv_transpose3d) == 1
    assert_close(graph(x), model(x))


def test_a_lazy_module_stays_accelerated(x):
    layer = pyvolconv.accelerate(nn.LazyConv3d(2, 3))
    assert ran(lambda: layer(x)) == 1
    assert ran(lambda: layer(x[:1])) == 1
    assert type(pyvolconv.revert(layer)) is nn.Conv3d


def test_compile_of_an_accelerated_model(net, x):
    expected = net(x)
    compiled = torch.compile(pyvolconv.accelerate(net), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert net.stem.weight.grad is not None
    torch.compiler.reset()


def test_example_input(net, x):
    assert pyvolconv.accelerate(net, x) is net
    assert pyvolconv.accelerate(nn.Bilinear(2, 2, 2), (torch.randn(3, 2), torch.randn(3, 2))) is not None


def test_example_input_that_the_model_refuses_changes_nothing(net):
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(RuntimeError) as refused:
        pyvolconv.accelerate(net, torch.randn(2, 3, 4, 5, 6))
    assert [type(module) for module in net.modules()] == kinds
    if sys.version_info >= (3, 11):
        assert "given to accelerate(): a tensor of (2, 3, 4, 5, 6) in torch.float32" in refused.value.__notes__[0]


def test_example_input_that_a_forced_backend_refuses_undoes_this_call(x):
    model = nn.Sequential(nn.Conv3d(1, 1, 1).bfloat16())
    with pyvolconv.use_backend("numba"), pytest.raises(UnsupportedProblemError):
        pyvolconv.accelerate(model, x.bfloat16())
    assert type(model[0]) is nn.Conv3d


def test_undoing_leaves_what_an_earlier_call_accelerated(x):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = pyvolconv.accelerate(nn.Conv3d(1, 2, 3)), nn.Conv3d(2, 2, 1)

        def forward(self, x):
            if is_ours(self.second):
                raise ValueError("not this one")
            return self.second(self.first(x))

    model = Picky()
    with pytest.raises(ValueError, match="not this one"):
        pyvolconv.accelerate(model, x)
    assert is_ours(model.first)
    assert type(model.second) is nn.Conv3d


def test_changed_result_is_undone(x):
    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 3)

        def forward(self, x):
            return self.conv(x).double() if is_ours(self.conv) else self.conv(x)

    model = Sly()
    with pytest.raises(RuntimeError, match=r"changed the result on example_input from .*float32.* to .*float64"):
        pyvolconv.accelerate(model, x)
    assert type(model.conv) is nn.Conv3d


def test_training_goes_the_same_way():
    torch.manual_seed(1)
    theirs = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 8, 3), nn.Flatten(), nn.LazyLinear(2)
    ).double()
    data, labels = torch.randn(24, 1, 6, 8, 8, dtype=torch.float64), torch.randint(0, 2, (24,))
    theirs(data)
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))

    def losses(model):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        history = []
        for step in range(12):
            batch = slice(step % 3 * 8, step % 3 * 8 + 8)
            loss = F.cross_entropy(model(data[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    expected = losses(theirs)
    assert losses(ours) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0]
