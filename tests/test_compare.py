"""`pyvolconv compare` from end to end on tiny volumes, and the parts of its plan."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import pyvolconv
from pyvolconv.cli import app
from pyvolconv.cost import busy
from pyvolconv.cost.machine import measure_machine
from pyvolconv.cost.pages import keep_pages
from pyvolconv.cost.profiler import profile_step
from pyvolconv.cost.results import PathTiming
from pyvolconv.problem import PASSES, ConvProblem
from pyvolconv.train.compare import _Comparison
from pyvolconv.train.lineup import lineup
from pyvolconv.train.models import build
from pyvolconv.train.npz import load_npz
from pyvolconv.train.paths import our_paths
from pyvolconv.train.plan import FIXED_STEPS, FULL, QUICK, STATES, Settings
from pyvolconv.train.runs import Trainer, projected
from pyvolconv.train.steps import (
    MOST_ROUNDS,
    ROUNDS_AT_ONCE,
    PathSpec,
    candidate,
    peak_memory,
    time_paths,
)
from pyvolconv.train.trials import fitted, gradient_difference

SIZE = (6, 8, 10)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two classes that a network can tell apart: where the volume is bright."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.random((40, *SIZE), dtype=np.float32)
    x[y == 1, 3:] += 2
    path = tmp_path_factory.mktemp("data") / "volumes.npz"
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, *SIZE, generator=generator), torch.arange(4) % 2


def make_cnn():
    return build("cnn", SIZE)


@pytest.mark.slow
def test_compare_end_to_end(volumes, tmp_path):
    arguments = ["compare", "--quick", "--data", volumes, "--out", tmp_path, "--epochs", 2, "--batch-size", 8]
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--backends", "im2col,numba")])
    assert result.exit_code == 0, result.output
    plain = json.loads((tmp_path / "results.json").read_text())
    timed = {(timing["path"], timing["pages"]) for timing in plain["paths"]}
    states = {pages for _, pages in timed}
    for path in ("torch contiguous", "torch channels_last_3d", "im2col", "numba", "LSTM"):
        assert {(path, pages) for pages in states} <= timed
    for timing in plain["paths"]:
        assert timing["milliseconds"] > 0
        if timing["network"] == "cnn":
            parts = sum(timing[part] for part in ("forward", "grad_input", "grad_weight", "other"))
            assert parts == pytest.approx(timing["milliseconds"])
            assert min(timing[part] for part in ("forward", "grad_input", "grad_weight", "other")) > 0
        if timing["ours"]:
            assert timing["gradient_difference"] < 1e-4
    assert [len(run["epochs"]) for run in plain["training"] if run["stopped"] == "max_epochs"]
    assert [run["network"] for run in plain["training"]] == ["lstm", "cnn", "cnn"]
    ours = [profile for profile in plain["profiles"] if profile["ours"]]
    assert ours
    for profile in ours:
        ran = [entry["backend"] for entry in profile["profile"]["entries"] if entry["problem"]]
        assert set(ran) == {profile["path"]}
        assert len(ran) == 8  # three convolutions, three passes each, but no grad_input of the first
    page = (tmp_path / "report.html").read_text()
    assert plain["answer"]["headline"] in page
    assert f"{plain['networks'][0]['parameters']:,}" in page
    assert (tmp_path / "paths.png").exists()


def test_ctrl_c_writes_what_was_measured(volumes, tmp_path, monkeypatch):
    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyvolconv.train.compare.time_paths", interrupt)
    arguments = ["compare", "--quick", "--data", volumes, "--out", tmp_path, "--backends", "im2col"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 130
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["interrupted"] is True
    assert plain["machine"]["peak_flops"] > 0
    assert "Interrupted" in (tmp_path / "report.html").read_text()


def test_a_checkpoint_of_another_run_costs_no_measurement(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr("pyvolconv.train.compare.time_paths", lambda candidates, *rest, **named: ([step_of_lstm()], []))
    arguments = ["compare", "--quick", "--data", volumes, "--out", tmp_path, "--backends", "im2col", "--epochs", 1]
    first = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--resume", "--batch-size", 4)])
    assert second.exit_code == 2
    assert "batch_size=8" in second.stderr
    assert second.stderr.count("pyvolconv: ") == 1
    plain = json.loads((tmp_path / "results.json").read_text())
    assert "batch_size=8" in plain["error"]
    assert plain["paths"]


def step_of_lstm():
    return PathTiming("LSTM", "lstm", "torch", None, False, "kept", 5.0, None, None, None, None, 3, 8, 8)


def test_ctrl_c_in_training_ends_the_comparison(volumes, tmp_path, monkeypatch):
    from pyvolconv.train import loop

    steps = []

    def third_step_is_interrupted(*arguments):
        steps.append(arguments)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return 0.5, 1

    monkeypatch.setattr(loop, "training_step", third_step_is_interrupted)
    config = loop.TrainConfig(batch_size=8, max_epochs=5)
    trainer = Trainer(load_npz(volumes), config, "cpu", "returned", tmp_path, False, Console(quiet=True))
    run, stopped = trainer.run("cnn", PathSpec("im2col", "cnn", "im2col", "ncdhw"), "CNN", None)
    assert stopped
    assert run.stopped == "interrupted"
    assert run.epochs == []
    assert run.estimated_seconds_per_epoch > 0


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_gradients_of_a_path_are_compared_with_torch(batch, layout):
    one = candidate(PathSpec("im2col", "cnn", "im2col", layout), make_cnn, *batch, 4)
    assert gradient_difference(one, make_cnn, *batch) < 1e-5


def test_a_wrong_gradient_shows(batch, monkeypatch):
    backend = next(backend for backend in pyvolconv.backends() if backend.name == "im2col")
    right = type(backend).grad_weight
    monkeypatch.setattr(type(backend), "grad_weight", lambda *arguments: right(*arguments) * 1.01)
    one = candidate(PathSpec("im2col", "cnn", "im2col", "ncdhw"), make_cnn, *batch, 4)
    assert gradient_difference(one, make_cnn, *batch) > 1e-3


def test_a_slow_path_gets_fewer_samples(batch):
    spec = PathSpec("torch contiguous", "cnn", None, "ncdhw")
    assert fitted([spec], make_cnn, *batch, longest_step=60.0).samples == 4
    assert fitted([spec], make_cnn, *batch, longest_step=1e-9).samples == 1


def test_fused_paths_of_a_family_come_with_dense_and_with_sparse_backward():
    problem = ConvProblem.parse("cpu-float32-ncdhw-n2ic16oc24-i5x6x7-k3-p1-bias")
    needs = [(problem, pass_) for pass_ in PASSES]
    specs = lineup({"cpp": ["ncdhw", "ndhwc"], "numba": ["ncdhw"]}, needs, "cpu")
    assert [(several[0].path, len(several)) for several in specs] == [
        ("torch contiguous", 1),
        ("torch channels_last_3d", 1),
        ("cpp", 2),
        ("cpp fused, dense backward", 2),
        ("cpp fused", 2),
        ("numba", 1),
    ]
    assert [(several[0].fused, several[0].dense_backward) for several in specs[2:5]] == [
        (False, False),
        (True, True),
        (True, False),
    ]


@pytest.mark.parametrize("dense", [False, True])
def test_path_with_dense_backward_runs_dense_gradients_only(batch, dense):
    spec = PathSpec("numba fused", "cnn", "numba", "ndhwc", True, dense)
    one = candidate(spec, make_cnn, *batch, 2)
    profile = profile_step(one.step, one.model, repeats=1, warmup=0, machine=measure_machine())
    ran = {entry.op.removeprefix("pyvolconv.") for entry in profile.entries if entry.op.startswith("pyvolconv.")}
    gradients = {"conv3d_grad_input", "conv3d_grad_weight"}
    sparse = {name.replace("conv3d", "conv3d_max_pool") for name in gradients}
    assert ran == {"conv3d_max_pool", *(gradients if dense else sparse)}
    assert gradient_difference(one, make_cnn, *batch) < 1e-5


def test_trying_ends_with_its_time_and_says_what_was_left_out(volumes, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("pyvolconv.train.compare.now", lambda: float(next(clock)))
    monkeypatch.setattr("pyvolconv.train.trials.now", lambda: float(next(clock)))
    comparison = _Comparison(Settings(data=volumes, batch_size=4), Console(quiet=True))
    comparison.budget = replace(FULL, trying=25.0)
    data = load_npz(volumes)
    x, y = comparison._batch(data)
    layouts = ["ncdhw", "ndhwc"]
    specs = lineup(dict.fromkeys(("im2col", "cpp", "numba"), layouts), [], "cpu")
    found = comparison._candidates(data, x, y, specs)
    paths = [one.spec.path for one in found]
    assert paths[:2] == ["torch contiguous", "torch channels_last_3d"]
    assert "cpp fused" in paths, "what accelerate makes is tried before other paths of ours"
    assert found[-1].spec.path == "LSTM"
    left_out = set(comparison.result.unavailable)
    assert "numba" in left_out
    assert left_out | {one.spec.path for one in found[:-1]} == {several[0].path for several in specs}
    assert all("the 25 s for trying paths were over" in why for why in comparison.result.unavailable.values())


def test_trying_never_leaves_out_a_peer(volumes):
    comparison = _Comparison(Settings(data=volumes, batch_size=4), Console(quiet=True))
    comparison.budget = replace(FULL, trying=0.0)
    data = load_npz(volumes)
    found = comparison._candidates(data, *comparison._batch(data), lineup({"im2col": ["ncdhw"]}, [], "cpu"))
    assert [one.spec.path for one in found] == ["torch contiguous", "torch channels_last_3d", "LSTM"]
    assert list(comparison.result.unavailable) == ["im2col"]


def test_layouts_that_there_was_no_time_for_are_named(batch):
    specs = [PathSpec("im2col", "cnn", "im2col", layout) for layout in ("ncdhw", "ndhwc")]
    assert fitted(specs, make_cnn, *batch, longest_step=60.0).untried == ()
    hurried = fitted(specs, make_cnn, *batch, longest_step=60.0, until=0.0)
    assert (hurried.spec.layout, hurried.untried) == ("ncdhw", ("ndhwc",))


@pytest.mark.parametrize(("others", "noted"), [(0.0, False), (0.15, False), (1.2, True)])
def test_a_busy_machine_is_noted(monkeypatch, others, noted):
    samples = iter([busy.Sample(0.0, 0.0, 0.0, 2), busy.Sample(10.0, 8.0, 8.0 + 10 * others, 2)])
    monkeypatch.setattr(busy, "sample", lambda: next(samples))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    comparison = _Comparison(Settings(), Console(quiet=True))
    with comparison._watching_load("the steps were timed"):
        pass
    assert [note[:57] for note in comparison.result.notes] == (
        ["Other processes kept 1.2 of 2 cores busy while the steps "] if noted else []
    )


def test_a_machine_that_does_not_tell_is_not_noted(monkeypatch):
    monkeypatch.setattr(busy, "sample", lambda: None)
    comparison = _Comparison(Settings(), Console(quiet=True))
    with comparison._watching_load("the steps were timed"):
        pass
    assert comparison.result.notes == []


def test_a_step_that_looked_slow_once_is_tried_again(batch, monkeypatch):
    times = iter([0.1, 9.0, 9.0, 0.1, 0.2, 0.2])
    monkeypatch.setattr("pyvolconv.train.trials._seconds", lambda step: next(times))
    spec = PathSpec("torch contiguous", "cnn", None, "ncdhw")
    assert fitted([spec], make_cnn, *batch, longest_step=1.0).samples == 4
    assert next(times, None) is None


def test_the_better_layout_is_the_one_that_is_better_on_all_samples(monkeypatch):
    x, y = torch.rand(8, 1, 8, 8, 10), torch.zeros(8, dtype=torch.long)
    seconds = {"ncdhw": [0.1, 0.1, 0.1, 0.5, 0.5], "ndhwc": [0.2, 0.2, 0.2, 0.4, 0.4]}
    times = iter([*seconds["ncdhw"], *seconds["ndhwc"]])
    monkeypatch.setattr("pyvolconv.train.trials._seconds", lambda step: next(times))
    specs = [PathSpec("torch", "cnn", None, layout) for layout in seconds]
    best = fitted(specs, make_cnn, x, y, longest_step=10.0)
    assert (best.spec.layout, best.samples) == ("ndhwc", 8)
    assert next(times, None) is None


def test_path_runs_on_the_forced_backend_only(batch, monkeypatch):
    calls = []
    for backend in pyvolconv.backends():
        right = type(backend).forward
        monkeypatch.setattr(
            type(backend),
            "forward",
            lambda self, *arguments, right=right: calls.append(self.name) or right(self, *arguments),
        )
    candidate(PathSpec("im2col", "cnn", "im2col", "ncdhw"), make_cnn, *batch, 2).step()
    assert calls == ["im2col"] * 3


def test_paths_that_cannot_run_are_refused_with_a_reason():
    needs = [(ConvProblem(2, 4, 4, (4, 4, 4), (3, 3, 3), dtype="complex64"), pass_) for pass_ in PASSES]
    able, refused = our_paths(None, needs)
    families = {backend.family for backend in pyvolconv.backends() if backend.ours}
    assert set(able) | set(refused) == families
    assert all(refused.values())
    assert "triton" in refused


def test_unknown_path_names_those_that_exist():
    with pytest.raises(ValueError, match=r"'aten' is no hand-written path; expected some of: .*im2col"):
        our_paths(["aten"], [])


@pytest.mark.parametrize("budget", [QUICK, FULL], ids=["quick", "full"])
def test_longest_steps_of_all_paths_fit_into_the_time_for_steps(budget):
    paths = 6
    steps_per_path = FIXED_STEPS + 2 * budget.repeats
    assert STATES * paths * steps_per_path * budget.longest_step(paths) <= budget.steps * 1.001
    assert budget.steps < budget.total


def test_turns_end_with_the_time(batch):
    one = candidate(PathSpec("torch contiguous", "cnn", None, "ncdhw"), make_cnn, *batch, 4)
    machine = measure_machine()
    (short,), _ = time_paths([one], "returned", machine, seconds=0.0, repeats=1, say=str)
    (long,), profiles = time_paths([one], "returned", machine, seconds=60.0, repeats=1, say=str)
    assert (short.steps, long.steps) == (ROUNDS_AT_ONCE, MOST_ROUNDS)
    assert profiles[0].batch_size == 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")
def test_memory_of_a_step_is_its_peak_and_not_what_lay_free():
    x, y = torch.randn(8, 1, *SIZE), torch.arange(8) % 2
    one = candidate(PathSpec("torch contiguous", "cnn", None, "ncdhw"), make_cnn, x, y, 8)
    with keep_pages() as kept:
        if not kept.active:
            pytest.skip(kept.reason)
        assert peak_memory(one) is None
    held = []

    def step():
        held[:] = [torch.ones(1 << 22), torch.ones(1 << 22)]
        held.clear()

    for _ in range(3):
        # The system counts pages in batches for each processor, so that a MiB may be missing.
        assert (2 << 24) - (1 << 20) <= peak_memory(replace(one, step=step)) < 3 << 24
    assert peak_memory(replace(one, samples=4)) is None


def test_a_run_that_came_to_its_own_end_is_not_projected():
    from pyvolconv.cost.results import Epoch, TrainingRun

    complete = TrainingRun(
        "a", "cnn", "cpp", True, "kept", [Epoch(1, 1.0, 0.9, 0.5, 0.6), Epoch(2, 2.0, 0.9, 0.1, 0.995)]
    )
    short = TrainingRun("b", "cnn", "torch", False, "kept", [Epoch(1, 5.0, 4.0, 0.5, 0.6)], stopped="time_budget")
    assert projected(short, complete).epochs_to_target == 2
    assert projected(short, complete).seconds_to_target == pytest.approx(10.0)
    ended = TrainingRun("b", "cnn", "torch", False, "kept", [Epoch(1, 5.0, 4.0, 0.5, 0.6)], stopped="max_epochs")
    assert projected(ended, complete).epochs_to_target is None
