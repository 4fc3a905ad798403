"""Chains that `accelerate` finds and runs as one pass, chains that it leaves alone, and what it says of each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv
from pyvolconv import chains
from pyvolconv.cost.counting import count_model

CHAIN = "Conv3d + ReLU + MaxPool3d in one pass"


def small(seed=0):
    return torch.randn(2, 3, 8, 9, 7, generator=torch.Generator().manual_seed(seed))


def settle(model):
    """Running statistics that are not the identity, so that a wrong fold shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def rows(model):
    return {row.module: (row.became, row.why_not) for row in pyvolconv.fusion_report(model).rows}


@pytest.fixture
def passes(monkeypatch):
    """Counts calls of the fused pass and of the plain convolution."""
    counts = {"fused": 0, "plain": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(chains, "conv3d_max_pool", counting("fused", pyvolconv.conv3d_max_pool))
    monkeypatch.setattr(pyvolconv.nn, "conv3d", counting("plain", pyvolconv.conv3d))
    return counts


def assert_same(model, reference, *inputs):
    """Results and gradients of every parameter, and of the inputs."""
    several = []
    for module in (model, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        module.zero_grad()
        y = module(*leaves)
        y.pow(2).sum().backward()
        several.append((y, [leaf.grad for leaf in leaves], [p.grad for p in module.parameters()]))
    torch.testing.assert_close(*several, rtol=1e-4, atol=1e-4)


class Ordinary(nn.Module):
    """Forward code as people write it: modules and functions, a helper, a loop, a mode, a skip connection."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 4, 3, padding=1, bias=False)
        self.block = nn.Sequential(nn.Conv3d(4, 4, 1), nn.LeakyReLU(0.1))
        self.layers = nn.ModuleList([nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)])
        self.skip = nn.Conv3d(4, 4, 1)
        self.pool = nn.MaxPool3d(2, ceil_mode=True)
        self.fc = nn.Linear(4, 2)
        self.rate = 0.5

    def stem(self, x):
        return F.relu(self.norm1(self.conv1(x)))

    def forward(self, x, scale=1.0):
        x = self.pool(self.stem(x))
        x = F.max_pool3d(torch.relu(self.conv2(x)), 2, ceil_mode=True)
        x = self.pool(self.block(x))
        for layer in self.layers:
            x = F.relu(layer(x), inplace=True)
        y = self.skip(x)
        x = y + F.relu(y)
        if self.training:
            x = F.dropout(x, self.rate)
        return self.fc(x.mean((2, 3, 4))) * scale


SEQUENTIALS = {
    "conv relu pool": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)), CHAIN),
    "conv pool": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d(2)),
        "Conv3d + MaxPool3d in one pass",
    ),
    "leaky relu, overlapping pool": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, 2), nn.LeakyReLU(0.3), nn.MaxPool3d(3, 2, 1)),
        "Conv3d + LeakyReLU + MaxPool3d in one pass",
    ),
    "silu": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding="same"), nn.SiLU(), nn.MaxPool3d((1, 2, 2))),
        "Conv3d + SiLU + MaxPool3d in one pass",
    ),
    "gelu": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.GELU("tanh"), nn.MaxPool3d(2, ceil_mode=True)),
        "Conv3d + GELU + MaxPool3d in one pass",
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv3d(3, 4, 3)), nn.ReLU()), nn.MaxPool3d(2)),
        CHAIN,
    ),
    "without a pool": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), "Conv3d + ReLU, in place"),
    "norm": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)).eval(),
        "Conv3d + BatchNorm3d + ReLU + MaxPool3d in one pass",
    ),
    "norm without bias and affine": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, bias=False), nn.BatchNorm3d(4, affine=False), nn.SiLU()).eval(),
        "Conv3d + BatchNorm3d + SiLU, folded",
    ),
    "norm alone": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)).eval(),
        "Conv3d + BatchNorm3d, folded",
    ),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_found_in_sequential(name):
    build, became = SEQUENTIALS[name]
    reference = build()
    if "affine" not in name:
        settle(reference)
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert next(iter(rows(model).values())) == (became, "")
    assert_same(model, reference, small())
    assert list(model.state_dict()) == list(reference.state_dict())
    assert str(model) == str(reference)
    assert len(model) == len(reference)


def test_a_chain_is_one_call(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 2, 1)))
    model(small())
    assert passes == {"fused": 1, "plain": 1}


def test_found_in_forward_code(passes):
    reference = settle(Ordinary())
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert rows(model) == {
        "conv1": ("Conv3d + BatchNorm3d + ReLU + MaxPool3d in one pass", "not now: BatchNorm3d is in training mode"),
        "conv2": (CHAIN, ""),
        "block.0": ("Conv3d + LeakyReLU + MaxPool3d in one pass", ""),
        "layers.0": ("Conv3d + ReLU, in place", ""),
        "layers.1": ("Conv3d + ReLU, in place", ""),
        "skip": ("Conv3d alone", "Ordinary.forward uses its result 2 times"),
    }
    assert_same(model.eval(), reference.eval(), small())
    assert passes["fused"] == 3
    assert rows(model)["conv1"][1] == ""
    assert_same_in_training(model, reference)


def assert_same_in_training(model, reference):
    model.train()
    reference.train()
    results = []
    for module in (model, reference):
        torch.manual_seed(0)
        results.append(module(small()))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_forward_code_is_followed_only_while_it_would_be_the_same(passes):
    """Everything that the code looks at may change afterwards."""
    reference = settle(Ordinary()).eval()
    model = pyvolconv.accelerate(copy.deepcopy(reference))

    def check(fused):
        passes["fused"] = 0
        torch.testing.assert_close(model(small()), reference(small()))
        assert passes["fused"] == fused

    check(3)
    torch.testing.assert_close(model(small(), 3.0), reference(small(), 3.0))
    torch.testing.assert_close(model(small(), scale=3.0), reference(small(), scale=3.0))
    for net in (model, reference):
        net.rate = 0.7
    check(3)  # it is not read in eval mode, and read anew in training:
    assert_same_in_training(model, reference)
    for net in (model.eval(), reference.eval()):
        net.layers.append(nn.Identity())
    check(0)
    for net in (model, reference):
        del net.layers[2]
        net.pool = nn.MaxPool3d(2, 1)
    check(3)
    for net in (model, reference):
        net.pool.register_forward_hook(lambda module, args, output: output + 1)
    check(1)


def not_found(build, why):
    return pytest.param(build, why, id=why)


class SubclassedConv(nn.Conv3d):
    def forward(self, input):
        return super().forward(input) + 1


class SubclassedReLU(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


class SubclassedSequential(nn.Sequential):
    def forward(self, input):
        return super().forward(input) + 1


def hooked(model, index):
    model[index].register_forward_hook(lambda module, args, output: output + 1)
    return model


def tied():
    model = nn.Sequential(nn.Conv3d(3, 3, 1), nn.ReLU(), nn.Conv3d(3, 3, 1), nn.ReLU())
    model[2].weight = model[0].weight
    return model


def repeated():
    conv = nn.Conv3d(3, 3, 1)
    return nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU())


def parametrized():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU())
    torch.nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3)), "nothing follows"),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.Tanh()), "Tanh follows, which is no link of a chain"),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.SiLU()), "SiLU follows without a pool: no pass would be saved"
        ),
        not_found(lambda: hooked(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), 0), "Conv3d has hooks"),
        not_found(lambda: hooked(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), 1), "ReLU has hooks"),
        not_found(lambda: nn.Sequential(SubclassedConv(3, 4, 3), nn.ReLU()), "SubclassedConv is a subclass of Conv3d"),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), SubclassedReLU()), "SubclassedReLU is a subclass of ReLU"),
        not_found(parametrized, "ParametrizedConv3d is a subclass of Conv3d"),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()),
            "padding_mode='circular'",
        ),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.LeakyReLU(-0.5)), "LeakyReLU has negative_slope=-0.5"),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d(2, dilation=2)), "MaxPool3d has dilation=2"),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.MaxPool3d((7, 7, 6))),
            "MaxPool3d has a window of more than 255 voxels",
        ),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4, track_running_stats=False)),
            "BatchNorm3d keeps no running statistics",
        ),
        not_found(tied, "stands in several places, or shares a parameter"),
        not_found(repeated, "stands in several places, or shares a parameter"),
        not_found(
            lambda: SubclassedSequential(nn.Conv3d(3, 4, 3), nn.ReLU()),
            "SubclassedSequential.forward forward() uses __class__ from around it",
        ),
    ],
)
def test_left_alone(build, why, passes):
    reference = build()
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert next(iter(rows(model).values()))[1] == why
    torch.testing.assert_close(model(small()), reference(small()))
    assert passes["fused"] == 0


def test_return_indices_is_left_alone(passes):
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d(2, return_indices=True))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert rows(model)["0"] == ("Conv3d alone", "MaxPool3d has return_indices=True")
    torch.testing.assert_close(model(small()), reference(small()))


FLAG = True
LIST = []


class Code(nn.Module):
    """Forward code given as a function of (self, x)."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv3d(3, 3, 1), nn.ReLU(), nn.MaxPool3d(2)
        self.seen = []
        self.calls = 0
        self.register_forward_hook(lambda module, args, output: None)

    @property
    def slope(self):
        return 1.0


def uses_intermediate(self, x):
    y = self.relu(self.conv(x))
    return self.pool(y) + y.mean()


def calls_twice(self, x):
    return self.pool(self.relu(self.conv(self.relu(self.conv(x)))))


def branches(self, x):
    return self.pool(self.relu(self.conv(x))) if x.mean() > 0 else x


def sets_attribute(self, x):
    self.calls += 1
    return self.pool(self.relu(self.conv(x)))


def appends(self, x):
    self.seen.append(1)
    return self.pool(self.relu(self.conv(x)))


def prints(self, x):
    print("forward")
    return self.pool(self.relu(self.conv(x)))


def draws(self, x):
    return self.pool(self.relu(self.conv(x))) * torch.rand(1)


def without_gradients(self, x):
    with torch.no_grad():
        return self.pool(self.relu(self.conv(x)))


def global_list(self, x):
    LIST.append(1)
    return self.pool(self.relu(self.conv(x)))


def reads_property(self, x):
    return self.pool(self.relu(self.conv(x))) * self.slope


def comprehends(self, x):
    return sum([layer(x) for layer in (self.conv, self.conv)])


def keywords(self, x, **options):
    return self.pool(self.relu(self.conv(x)))


def calls_forward(self, x):
    return self.pool(self.relu(self.conv.forward(x)))


def in_two_chains(self, x):
    return self.pool(self.relu(self.conv(x))) + self.conv(x).mean()


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (uses_intermediate, ""),
        (calls_twice, "Net.forward calls it 2 times"),
        (in_two_chains, "Net.forward calls it 2 times"),
        (branches, "Net.forward branches or loops on a value of its input"),
        (sets_attribute, "Net.forward sets_attribute() sets an attribute"),
        (appends, "Net.forward reads self.seen, which is no module, parameter or plain value"),
        (prints, "Net.forward prints() uses print"),
        (draws, "Net.forward calls rand without a tensor of its input"),
        (without_gradients, "Net.forward without_gradients() has a `with` block"),
        (global_list, "Net.forward global_list() uses LIST"),
        (reads_property, "Net.forward reads self.slope, a property"),
        (keywords, "Net.forward takes **options"),
        (calls_forward, "Net.forward reads self.conv.forward, which is no module, parameter or plain value"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forward_code_that_cannot_be_proven(forward, why, passes):
    reference = type("Net", (Code,), {"forward": forward})()
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert rows(model)["conv"][1] == why
    torch.manual_seed(0)
    expected = reference(small())
    torch.manual_seed(0)
    torch.testing.assert_close(model(small()), expected)
    assert passes["fused"] == 0


def test_guards_hold_on_global_names(passes, monkeypatch):
    def forward(self, x):
        y = self.relu(self.conv(x))
        return self.pool(y) if FLAG else y

    net = type("Net", (Code,), {"forward": forward})()
    model = pyvolconv.accelerate(net)
    assert model(small()).shape[2] == 4
    assert passes["fused"] == 1
    monkeypatch.setitem(globals(), "FLAG", False)
    assert model(small()).shape[2] == 8
    assert passes["fused"] == 1


def test_hooks_registered_later_see_everything(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    seen = []
    for register in (model[1].register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(lambda module, args, output: seen.append(type(module).__name__))
        model(small())
        assert passes["fused"] == 0
        handle.remove()
    assert seen == ["ReLU", "Conv3d", "ReLU", "MaxPool3d", "Sequential"]
    model(small())
    assert passes["fused"] == 1
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    model(small()).sum().backward()
    assert seen[-1] == "backward"


def test_modules_replaced_later_are_run(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    model[1] = nn.Tanh()
    expected = F.max_pool3d(torch.tanh(F.conv3d(small(), model[0].weight, model[0].bias)), 2)
    torch.testing.assert_close(model(small()), expected)
    model[1] = nn.ReLU()
    model.append(nn.Flatten())
    assert model(small()).dim() == 2
    assert passes["fused"] == 1
    assert model[:2](small()).shape == (2, 4, 6, 7, 5)


def test_training_norm_is_not_folded_and_keeps_its_statistics():
    reference = settle(nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    for mode in (True, False, True):
        model.train(mode)
        reference.train(mode)
        assert_same(model, reference, small())
        torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_norm_refuses_one_sample_as_before():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()).eval()
    with pytest.raises(ValueError, match="expected 5D input"):
        pyvolconv.accelerate(model)(small()[0])


def tree(model):
    return {path: (type(module), dict(module.__dict__)) for path, module in model.named_modules()}


@pytest.mark.parametrize("build", [Ordinary, lambda: SEQUENTIALS["nested"][0]()])
def test_revert_restores(build, passes):
    model = build()
    keys, before = list(model.state_dict()), {path: type(module) for path, module in model.named_modules()}
    attributes = {path: list(module.__dict__) for path, module in model.named_modules()}
    pyvolconv.accelerate(pyvolconv.accelerate(model))
    assert list(model.state_dict()) == keys
    assert {path: list(module.__dict__) for path, module in model.named_modules()} == attributes
    assert pyvolconv.revert(model) is model
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(became.endswith("of torch") for became, _ in rows(model).values())
    model.eval()(small())
    assert passes == {"fused": 0, "plain": 0}


@pytest.mark.parametrize("build", [Ordinary, lambda: SEQUENTIALS["nested"][0]()])
def test_copies_stay_fused_and_pickles_are_the_original(build, passes):
    model = pyvolconv.accelerate(settle(build()).eval())
    expected = model(small())
    fused = passes["fused"]
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(small()), expected)
    assert passes["fused"] == 2 * fused > 0
    assert next(copied.parameters()) is not next(model.parameters())
    if build is not Ordinary:
        return
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored) is Ordinary
    assert type(restored.conv1) is nn.Conv3d
    torch.testing.assert_close(restored(small()), expected)


def test_without_fusing(passes):
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)), fuse=False)
    assert type(model) is nn.Sequential
    assert rows(model) == {"0": ("Conv3d alone", "accelerated without fusing")}
    model(small())
    assert passes == {"fused": 0, "plain": 1}


def test_example_input_is_checked_with_the_chains():
    model = Ordinary().eval()
    assert pyvolconv.accelerate(model, small()) is model
    assert rows(model)["conv2"] == (CHAIN, "")


@pytest.mark.parametrize("build", [Ordinary, lambda: SEQUENTIALS["norm"][0]()])
def test_compiles_in_one_graph(build):
    reference = settle(build()).eval()
    model = torch.compile(pyvolconv.accelerate(copy.deepcopy(reference)), fullgraph=True, backend="aot_eager")
    assert_same(model, reference, small())


def test_traced_by_torch_fx_as_before():
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2))
    traced = torch.fx.symbolic_trace(pyvolconv.accelerate(copy.deepcopy(reference)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]


def test_under_autocast_vmap_and_forced_backends():
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    x = small()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), reference(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), torch.func.vmap(reference)(x[:, None]))
    for name in ("numba", "im2col", "aten", "cpp"):
        with pyvolconv.use_backend(name):
            assert_same(model, reference, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_training_gives_the_same_losses(layout):
    """Twenty steps of Adam; rounding alone may tell them apart."""
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Conv3d(4, 8, 3, padding=1),
        nn.LeakyReLU(),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2 * 3, 2),
    )
    reference = reference.double().to(memory_format=layout)
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    x, labels = torch.randn(16, 1, 7, 8, 9).double(), torch.randint(2, (16,))
    losses = []
    for net in (model, reference):
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        history = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.contiguous(memory_format=layout)), labels)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    assert losses[0][-1] < losses[0][0] / 2
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)


def test_the_profiler_sees_the_pass_that_runs(passes):
    """Counted at its convolution, with the gradients' sparse work; of the rest only ReLU's mask, of pooled size."""
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)))
    costs = {
        (cost.layer, cost.kind): cost for cost in count_model(model, torch.zeros(2, 3, 8, 9, 7, requires_grad=True))
    }
    assert passes == {"fused": 1, "plain": 0}
    assert set(costs) == {("0", "conv"), ("0", "activation"), ("0", "elementwise")}
    assert costs["0", "activation"].passes["backward"].flops == 2 * 4 * 3 * 3 * 2
    conv = costs["0", "conv"]
    voxels, chosen, taps = 2 * 4 * 6 * 7 * 5, 2 * 4 * 3 * 3 * 2, 3 * 27
    assert conv.passes["forward"].flops == 2 * voxels * taps + voxels
    assert conv.passes["grad_weight"].flops >= 2 * chosen * taps
    assert conv.passes["grad_weight"].flops < 2 * voxels * taps / 4
    model[1].register_forward_hook(lambda module, args, output: None)
    count_model(model, torch.zeros(2, 3, 8, 9, 7))
    assert passes == {"fused": 1, "plain": 1}


def test_report_is_a_table():
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2)))
    assert str(pyvolconv.fusion_report(model)).splitlines() == [
        "module  became                   why not more",
        "------  -----------------------  -------------------------------------",
        "0       Conv3d + ReLU, in place",
        "2       ConvTranspose3d alone    transposed convolutions are not fused",
    ]


def test_report_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"fusion_report\(\) takes a torch.nn.Module, got int"):
        pyvolconv.fusion_report(3)
