"""Counted work against hand numbers, against brute force, and of the model as a whole."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyvolconv.cost import LayerCost, PassCost, count_model, count_optimizer
from pyvolconv.cost.formulas import FORMULAS
from pyvolconv.cost.operators import operator_cost

BATCH = 32


def by_layer(costs: list[LayerCost], kind: str) -> dict[str, LayerCost]:
    return {cost.layer: cost for cost in costs if cost.kind == kind}


@pytest.fixture(scope="module")
def mission_cnn() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv3d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2, ceil_mode=True)]

    head = [nn.Flatten(), nn.Linear(32 * 4 * 4 * 8, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*block(1, 16), *block(16, 24), *block(24, 32), *head)


@pytest.fixture(scope="module")
def cnn_costs(mission_cnn: nn.Module) -> list[LayerCost]:
    labels = torch.zeros(BATCH, dtype=torch.long)
    return count_model(mission_cnn, torch.zeros(BATCH, 1, 29, 30, 60), lambda output: F.cross_entropy(output, labels))


class FramesThroughLSTM(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, **options: object) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1800, 16, 2, batch_first=True, dtype=dtype, **options)  # type: ignore[arg-type]
        self.dense = nn.Linear(16 * (1 + bool(options.get("bidirectional"))), 2, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.dense(self.lstm(x.flatten(2))[0][:, -1])
        return result


def test_convolutions_of_the_mission_cnn_by_hand(cnn_costs):
    conv = by_layer(cnn_costs, "conv")
    values = {"0": 32 * 16 * 29 * 30 * 60, "3": 32 * 24 * 15 * 15 * 30, "6": 32 * 32 * 8 * 8 * 15}
    taps = {"0": 27, "3": 16 * 27, "6": 24 * 27}
    for layer, cost in conv.items():
        products = 2 * values[layer] * taps[layer]
        assert cost.passes["forward"].flops == products + values[layer]
        assert cost.passes["grad_weight"].flops == products + values[layer]
        if layer != "0":
            assert cost.passes["grad_input"].flops == products
    assert set(conv) == {"0", "3", "6"}
    assert "grad_input" not in conv["0"].passes, "the network needs no gradient of its input"
    assert conv["0"].passes["forward"].min_bytes == 4 * (32 * 29 * 30 * 60 * 17 + 16 * 27 + 16)
    assert [conv[layer].weights for layer in "036"] == [432, 10368, 20736]
    assert [conv[layer].weight_uses for layer in "036"] == [29 * 30 * 60, 15 * 15 * 30, 8 * 8 * 15]


def test_the_rest_of_the_mission_cnn_by_hand(cnn_costs):
    relu, pool = by_layer(cnn_costs, "activation"), by_layer(cnn_costs, "pool")
    values = 32 * 16 * 29 * 30 * 60
    pooled = 32 * 16 * 15 * 15 * 30
    assert relu["1"].passes == {"forward": PassCost(values, 8 * values), "backward": PassCost(values, 12 * values)}
    # torch keeps 8-byte indices of each pooled value.
    assert pool["2"].passes == {
        "forward": PassCost(values, 4 * values + 12 * pooled),
        "backward": PassCost(pooled, 4 * values + 12 * pooled),
    }
    dense = by_layer(cnn_costs, "linear")["10"]
    assert dense.passes["forward"].flops == 2 * 32 * 4096 * 16 + 32 * 16
    assert dense.passes["grad_input"].flops == 2 * 32 * 4096 * 16
    assert dense.passes["grad_weight"].flops == 2 * 32 * 4096 * 16 + 32 * 16
    assert (dense.weights, dense.weight_uses) == (4096 * 16, 1)
    assert by_layer(cnn_costs, "loss").keys() == {"loss"}
    assert all(cost.exact for cost in cnn_costs)
    assert not [cost for cost in cnn_costs if cost.layer == "9"], "flatten moves and computes nothing"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_layer_by_layer_by_hand(bidirectional):
    costs = count_model(FramesThroughLSTM(bidirectional=bidirectional), torch.zeros(BATCH, 29, 1, 30, 60))
    lstm = by_layer(costs, "lstm")
    directions = ("", "_reverse") if bidirectional else ("",)
    assert set(lstm) == {f"lstm.l{layer}{direction}" for layer in (0, 1) for direction in directions}
    frames, hidden = BATCH * 29, 16
    for layer, cost in lstm.items():
        first = layer.startswith("lstm.l0")
        inputs = 1800 if first else hidden * len(directions)
        products = 2 * 4 * hidden * (inputs + hidden)
        assert cost.passes["forward"].flops == frames * (products + 2 * 4 * hidden + 9 * hidden)
        needed = products if not first else 2 * 4 * hidden * hidden
        assert cost.passes["grad_input"].flops == frames * (needed + 23 * hidden)
        assert cost.passes["grad_weight"].flops == frames * (products + 4 * hidden)
        assert cost.weights == 4 * hidden * (inputs + hidden)
        assert cost.weight_uses == 29, "once per frame"


def test_lstm_made_of_plain_operators_counts_the_same_products():
    """In float64 torch runs an LSTM as single matrix products and activations; the products must agree."""
    plain = count_model(FramesThroughLSTM(torch.float64), torch.zeros(4, 29, 1, 30, 60, dtype=torch.float64))
    linear = by_layer(plain, "linear")["lstm"]
    products = 4 * 29 * 2 * 4 * 16 * (1800 + 16 + 16 + 16)
    biases = 4 * 29 * 4 * 16 * 4
    assert linear.passes["forward"].flops == pytest.approx(products + biases, rel=1e-3)
    assert linear.weight_uses == 29
    assert linear.weights == 4 * 16 * (1800 + 16 + 16 + 16)


def test_cudnn_lstm_counts_as_onednn_does():
    x, state = torch.zeros(5, 3, 7), torch.zeros(4, 3, 6)
    lstm = nn.LSTM(7, 6, 2, bidirectional=True)
    weights = [weight.detach() for weight in lstm.parameters()]
    output = torch.zeros(5, 3, 12)
    forward_args = (x, weights, 4, None, state, state, 2, 6, 0, 2, False, 0.0, True, True, [], None)
    forward = FORMULAS["aten::_cudnn_rnn"](forward_args, (output, state, state, None, None), lambda tensor: True)
    backward_args = (x, weights, 4, None, state, state, output, output, None, None, *forward_args[6:], None, [True] * 4)
    backward = FORMULAS["aten::_cudnn_rnn_backward"](backward_args, (x, state, state, weights), lambda tensor: True)
    expected = by_layer(count_model(_FirstResult(lstm), x), "lstm").values()
    for work in (*forward.works, *backward.works):
        assert work.flops == sum(cost.passes[str(work.pass_)].flops for cost in expected)
    assert sum(weight.numel() for weight in forward.works[0].weights) == sum(cost.weights for cost in expected)


class _FirstResult(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)[0]
        return result


CONVOLUTIONS = [
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2},
    {"in_channels": 4, "out_channels": 4, "kernel_size": (1, 3, 2), "stride": (1, 2, 3), "bias": False},
    {"in_channels": 4, "out_channels": 8, "kernel_size": 2, "dilation": 2, "groups": 4},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda options: str(options["kernel_size"]))
@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_convolution_against_brute_force(kind, options):
    """Count multiply-adds tap by tap; a grouped backward pass costs what the forward pass costs."""
    layer = kind(**options)
    x = torch.zeros(2, 4, 5, 6, 7, requires_grad=True)
    (cost,) = [cost for cost in count_model(layer, x) if cost.kind == "conv"]
    y = layer(x)
    # Direct convolution visits every tap of each output value, a transposed one scatters each input value to every tap.
    visited = x if kind is nn.ConvTranspose3d else y
    taps_per_value = math.prod(layer.weight.shape[1:])
    products = sum(2 * taps_per_value for _ in itertools.product(*map(range, visited.shape)))
    bias = y.numel() if layer.bias is not None else 0
    assert cost.passes["forward"].flops == products + bias
    assert cost.passes["grad_input"].flops == products
    assert cost.passes["grad_weight"].flops == products + bias
    assert cost.weights == layer.weight.numel()
    assert cost.problem is not None


@pytest.mark.parametrize("kind", [nn.MaxPool3d, nn.AvgPool3d])
@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 2, "ceil_mode": True}, {"kernel_size": (1, 3, 2), "stride": (2, 1, 2), "padding": (0, 1, 1)}],
    ids=["ceil_mode", "padding"],
)
def test_pooling_against_brute_force(kind, options):
    x = torch.zeros(2, 3, 5, 6, 7, requires_grad=True)
    layer = kind(**options)
    (cost,) = count_model(layer, x)
    # A window sum of ones without a divisor is the number of values it reaches.
    reached = F.avg_pool3d(torch.ones(x.shape), **_avg_options(layer), divisor_override=1)
    divisions = reached.numel() if kind is nn.AvgPool3d else 0
    assert cost.kind == "pool"
    assert cost.passes["forward"].flops == reached.sum().item() + divisions


def _avg_options(layer: nn.Module) -> dict[str, object]:
    return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "ceil_mode")}


def test_matrix_product_in_attention_has_no_weights():
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    (work,) = operator_cost(torch.ops.aten.bmm.default, (a, b), a @ b).works
    assert (work.flops, work.min_bytes, work.weights) == (2 * 2 * 3 * 4 * 5, 4 * (24 + 40 + 30), ())


def test_views_and_fills():
    x = torch.zeros(4, 6)
    assert operator_cost(torch.ops.aten.t.default, (x,), x.t()).works[0].min_bytes == 0
    assert operator_cost(torch.ops.aten.zero_.default, (x,), x).works[0].min_bytes == 96
    assert operator_cost(torch.ops.aten.copy_.default, (x, x), x).works[0].min_bytes == 192
    assert operator_cost(torch.ops.aten.add_.Tensor, (x, x), x).works[0].min_bytes == 288
    assert operator_cost(torch.ops.aten.zeros_like.default, (x,), x).works[0].min_bytes == 96
    expanded = torch.zeros(1).expand(1000)
    assert operator_cost(torch.ops.aten.neg.default, (expanded,), torch.zeros(1000)).works[0].min_bytes == 4004


def test_unknown_operator_is_marked():
    x = torch.zeros(5)
    cost = operator_cost(torch.ops.aten.erfinv.default, (x,), x)
    assert (cost.kind, cost.exact, cost.works[0].flops) == ("other", False, 5)


def test_functional_and_fused_calls_are_counted_and_named():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.max_pool3d(F.relu(self.conv(x)), 2)

    costs = count_model(Functional(), torch.zeros(2, 1, 6, 6, 6))
    assert [(cost.layer, cost.kind) for cost in costs] == [("conv", "conv"), ("", "activation"), ("", "pool")]
    assert all("backward" in cost.passes for cost in costs[1:])


def test_one_module_in_two_places_is_summed():
    shared = nn.Conv3d(2, 2, 1, bias=False)
    costs = count_model(nn.Sequential(shared, shared), torch.zeros(3, 2, 4, 4, 4))
    (cost,) = by_layer(costs, "conv").values()
    assert cost.passes["forward"].flops == 2 * (2 * 3 * 2 * 64 * 2)
    assert (cost.weights, cost.weight_uses) == (4, 2 * 64)


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    costs = count_model(model, torch.zeros(2, 1, 6, 6, 6))
    assert {cost.kind for cost in costs} >= {"conv", "norm", "dropout", "linear"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_frozen_layers_need_no_grad_weight():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 2, 3))
    model[0].requires_grad_(False)
    conv = by_layer(count_model(model, torch.zeros(1, 1, 8, 8, 8)), "conv")
    assert set(conv["0"].passes) == {"forward"}
    assert set(conv["1"].passes) == {"forward", "grad_weight"}


def test_optimizers():
    weights = [nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(2, 3))]
    adam = count_optimizer(torch.optim.Adam(weights))
    assert adam.passes == {"update": PassCost(13 * 16, 7 * 4 * 16)}
    assert count_optimizer(torch.optim.SGD(weights, momentum=0.9)).passes == {"update": PassCost(4 * 16, 5 * 4 * 16)}
    with pytest.raises(ValueError, match="Rprop is not counted; expected SGD, Adam or AdamW"):
        count_optimizer(torch.optim.Rprop(weights))


def test_costs_are_json(cnn_costs):
    read = json.loads(json.dumps([cost.to_dict() for cost in cnn_costs]))
    assert read[0]["passes"]["forward"]["flops"] == cnn_costs[0].passes["forward"].flops
    assert read[0]["flops"] == cnn_costs[0].flops
