"""The profiler's bookkeeping: nothing lost, nothing counted twice, every layer seen in both directions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyvolconv
from pyvolconv.cost import Machine, StepProfile, Timing, count_model, profile_step
from pyvolconv.cost.trace import trace_step

from .closeness import assert_close

MACHINE = Machine("x", "x86_64", "AVX2", 1, 1, {}, 2**30, "cpu", 1e11, "given", 1e10, "none", None, {})


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    labels = torch.zeros(x.shape[0], dtype=torch.long)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3), nn.Flatten(), nn.Linear(108, 2)
    )


class FramesThroughLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 4, 2, batch_first=True)
        self.dense = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.dense(self.lstm(x)[0][:, -1])
        return result


def profile(model: nn.Module, x: torch.Tensor, repeats: int = 3) -> StepProfile:
    return profile_step(training_step(model, x), model, repeats=repeats, warmup=1, machine=MACHINE)


@pytest.fixture(scope="module")
def cnn_profile() -> StepProfile:
    return profile(cnn(), torch.randn(3, 1, 12, 12, 12), repeats=5)


def passes(result: StepProfile, layer: str, kind: str) -> set[str]:
    return {entry.pass_ for entry in result.entries if (entry.layer, entry.kind) == (layer, kind)}


def test_parts_sum_to_the_step(cnn_profile):
    operators = sum(entry.seconds for entry in cnn_profile.entries)
    framework = sum(cnn_profile.framework_seconds.values())
    total = operators + framework + cnn_profile.instrument_seconds
    assert total == pytest.approx(cnn_profile.profiled_seconds, rel=1e-6)
    assert all(entry.seconds >= 0 and entry.page_faults >= 0 for entry in cnn_profile.entries)
    assert min(cnn_profile.framework_seconds.values()) >= 0
    assert sum(cnn_profile.by_layer().values()) == pytest.approx(operators)


def test_split_sums_to_the_step_with_and_without_the_profiler(cnn_profile):
    assert cnn_profile.split().total == pytest.approx(1e3 * cnn_profile.step.median)
    assert cnn_profile.profiled_split().total == pytest.approx(1e3 * cnn_profile.profiled_seconds)
    conv = sum(1e3 * entry.seconds for entry in cnn_profile.entries if entry.kind == "conv")
    split = cnn_profile.split()
    assert split.forward + split.grad_input + split.grad_weight == pytest.approx(conv)
    assert min(split.forward, split.grad_input, split.grad_weight) > 0
    assert len(cnn_profile.step.seconds) == 5


def test_every_layer_is_seen_in_both_directions(cnn_profile):
    assert passes(cnn_profile, "0", "conv") == {"forward", "grad_weight"}
    assert passes(cnn_profile, "3", "conv") == {"forward", "grad_input", "grad_weight"}
    assert passes(cnn_profile, "1", "activation") == {"forward", "backward"}
    assert passes(cnn_profile, "2", "pool") == {"forward", "backward"}
    assert passes(cnn_profile, "5", "linear") == {"forward", "grad_input", "grad_weight"}
    assert passes(cnn_profile, "loss", "loss") == {"forward", "backward"}
    assert passes(cnn_profile, "optimizer", "optimizer") == {"update"}


def test_only_a_shared_operator_is_estimated(cnn_profile):
    estimated = {(entry.layer, entry.pass_) for entry in cnn_profile.entries if entry.split_estimated}
    assert estimated == {("3", "grad_input"), ("3", "grad_weight")}


def test_profiled_work_is_the_counted_work(cnn_profile):
    """Two routes to the same numbers: operators as they ran, and the model on fake tensors."""
    labels = torch.zeros(3, dtype=torch.long)
    counted = {
        (cost.layer, cost.kind, pass_): work.flops
        for cost in count_model(cnn(), torch.zeros(3, 1, 12, 12, 12), lambda y: F.cross_entropy(y, labels))
        for pass_, work in cost.passes.items()
        if work.flops
    }
    profiled: dict[tuple[str, str, str], float] = {}
    for entry in cnn_profile.entries:
        if entry.flops and entry.layer != "optimizer":
            key = entry.layer, entry.kind, entry.pass_
            profiled[key] = profiled.get(key, 0) + entry.flops
    assert profiled == counted


def test_rates_follow_from_seconds(cnn_profile):
    for entry in cnn_profile.entries:
        assert entry.least_seconds == MACHINE.least_seconds(entry.flops, entry.min_bytes)
        assert entry.roofline_share * entry.seconds == pytest.approx(entry.least_seconds)
        assert entry.gflops_per_second * entry.seconds * 1e9 == pytest.approx(entry.flops)
        assert entry.gbytes_per_second * entry.seconds * 1e9 == pytest.approx(entry.min_bytes)


def test_lstm_layers_in_both_directions():
    result = profile(FramesThroughLSTM(), torch.randn(2, 5, 12))
    for layer in ("lstm.l0", "lstm.l1"):
        assert passes(result, layer, "lstm") == {"forward", "backward"}
        assert all(entry.flops > 0 for entry in result.entries if entry.layer == layer and entry.kind == "lstm")
    assert result.split().forward == 0
    assert result.split().other == pytest.approx(1e3 * result.step.median)


@pytest.mark.parametrize("family", ["aten", "im2col"])
def test_package_operators_are_passes_of_their_own_and_name_their_backend(family):
    model = nn.Sequential(pyvolconv.Conv3d(1, 4, 3), pyvolconv.Conv3d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 6**3, 2))
    with pyvolconv.use_backend(family):
        result = profile(model, torch.randn(2, 1, 10, 10, 10), repeats=1)
    conv = {(entry.layer, entry.pass_): entry for entry in result.entries if entry.op.startswith("pyvolconv")}
    assert set(conv) == {
        ("0", "forward"), ("0", "grad_weight"), ("1", "forward"), ("1", "grad_input"), ("1", "grad_weight")
    }  # fmt: skip
    assert all(entry.backend.startswith(family) for entry in conv.values())
    assert all(entry.problem is not None and entry.kind == "conv" for entry in conv.values())
    bias = [entry for entry in result.entries if entry.op == "aten.sum" and entry.kind == "conv"]
    assert {entry.pass_ for entry in bias} == {"grad_weight"}, "the bias gradient belongs to grad_weight"


def test_results_do_not_change_under_the_profiler():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 12, 12, 12)
    first, second = cnn(), cnn()
    second.load_state_dict(first.state_dict())
    training_step(first, x)()
    step = training_step(second, x)
    trace_step(step, second, split=True)
    for expected, got in zip(first.parameters(), second.parameters(), strict=True):
        assert_close(got, expected)


def test_hooks_are_removed_even_when_the_step_fails():
    model = cnn()

    def step() -> None:
        model(torch.zeros(1, 2, 12, 12, 12))

    with pytest.raises(RuntimeError, match="channels"):
        trace_step(step, model)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_recomputed_layers_keep_their_names():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return result

    model = Checkpointed()
    x = torch.randn(2, 3, requires_grad=True)
    trace = trace_step(lambda: model(x).sum().backward(), model)
    products: Counter[tuple[str, str]] = Counter()
    for call, spent in trace.calls.items():
        if call.operator in ("aten.mm", "aten.addmm"):
            products[call.layer, call.phase] += spent.calls
    assert products[("inner.0", "forward")] == 2, "once in forward, once recomputed"
    assert products[("inner.0", "backward")] == 2, "grad_input and grad_weight"


def test_double_backward_belongs_to_the_layer():
    layer = nn.Conv3d(1, 2, 3)
    x = torch.randn(1, 1, 5, 5, 5, requires_grad=True)

    def step() -> None:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    layers = {call.layer for call in trace_step(step, layer).calls if call.kind == "conv"}
    assert "" in layers


def test_invalid_repeats():
    with pytest.raises(ValueError, match="repeats=0: at least one profiled run is needed"):
        profile_step(lambda: None, cnn(), repeats=0)


def test_profile_is_json(cnn_profile):
    read = json.loads(json.dumps(cnn_profile.to_dict()))
    assert read["split_ms"]["total"] == pytest.approx(cnn_profile.split().total)
    assert len(read["entries"]) == len(cnn_profile.entries)
    assert read["entries"][0]["pass_"] == cnn_profile.entries[0].pass_
    assert Timing(tuple(read["step"]["seconds"])) == cnn_profile.step
