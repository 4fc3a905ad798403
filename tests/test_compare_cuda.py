"""The comparison on a GPU, every way of it that needs none: a pretended device, and values made up here."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import pyvolconv
from pyvolconv.backends.aten import AtenBackend
from pyvolconv.backends.triton_base import TritonLaunches
from pyvolconv.backends.triton_implicit_gemm import TritonImplicitGemm
from pyvolconv.cli import app
from pyvolconv.cost import gpu
from pyvolconv.cost.counting import count_model
from pyvolconv.cost.machine import _measure
from pyvolconv.dispatch import forget_choices
from pyvolconv.errors import failure
from pyvolconv.problem import PASSES, ConvProblem
from pyvolconv.train import compare, description, lineup, steps
from pyvolconv.train.loop import TrainConfig, train
from pyvolconv.train.models import build
from pyvolconv.train.npz import load_npz
from pyvolconv.train.plan import Settings
from pyvolconv.train.resident import ResidentDataset, resident

from . import pretend_cuda

SIZE = (6, 8, 10)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there, and need not be pretended")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.random((40, *SIZE), dtype=np.float32)
    x[y == 1, 3:] += 2
    path = tmp_path_factory.mktemp("data") / "volumes.npz"
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture
def pretended(monkeypatch):
    """A device on which Triton's passes are torch's, as the interpreter takes too long; fused ones are left out."""
    labels = torch.zeros(4, dtype=torch.long)
    models = [build(name, SIZE) for name in ("cnn", "lstm")]
    counted = {
        type(model): count_model(
            model, torch.zeros(4, 1, *SIZE), lambda logits: torch.nn.functional.cross_entropy(logits, labels)
        )
        for model in models
    }
    pretend_cuda.install(monkeypatch)
    # Fake tensors do not take to pretended devices; the real ones of a GPU are counted on the CPU as well.
    monkeypatch.setattr(description, "count_model", lambda model, *rest: counted[type(model)])
    for name in PASSES:
        ran = getattr(AtenBackend, name)
        monkeypatch.setattr(TritonLaunches, name, lambda self, *args, ran=ran: ran(AtenBackend(), *args))
    monkeypatch.setattr(lineup, "fuses", lambda *args: False)
    monkeypatch.setattr(steps, "MOST_ROUNDS_ON_GPU", 2)
    monkeypatch.setattr(steps, "STEPS_AT_ONCE", 1)
    monkeypatch.setattr(gpu, "MATRIX_SIZE", 32)
    monkeypatch.setattr(gpu, "LARGEST_COPY", 2**16)
    _measure.cache_clear()
    yield
    _measure.cache_clear()
    forget_choices()


@pytest.mark.usefixtures("pretended")
def test_compare_on_a_gpu_end_to_end(volumes, tmp_path):
    arguments = ["compare", "--device", "cuda", "--quick", "--data", volumes, "--out", tmp_path, "--epochs", 2]
    result = CliRunner().invoke(app, [*map(str, arguments), "--batch-size", "4"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    plain = json.loads((tmp_path / "results.json").read_text())
    timed = {timing["path"]: timing for timing in plain["paths"]}
    assert list(timed) == [
        "torch contiguous",
        "torch channels_last_3d",
        "torch contiguous, tf32 off",
        "torch channels_last_3d, tf32 off",
        "torch contiguous, graph",
        "torch channels_last_3d, graph",
        "triton",
        "triton, tf32 off",
        "triton, graph",
        "im2col",
        "im2col, graph",
        "LSTM",
    ]
    for path, timing in timed.items():
        assert timing["pages"] == "cached"
        assert timing["samples"] == 4
        assert timing["page_faults"] is None
        assert timing["memory_bytes"] == (None if timing["graph"] else 4000)
        assert timing["graph"] is path.endswith(", graph")
        if path != "LSTM":
            parts = [timing[part] for part in ("forward", "grad_input", "grad_weight", "other")]
            assert sum(parts) == pytest.approx(timing["milliseconds"])
            assert min(parts[:3]) > 0
            assert timing["gradient_difference"] < 1e-4
    assert {timed[path]["tf32"] for path in timed if "tf32 off" in path} == {False}
    assert timed["triton"]["tf32"] is timed["torch contiguous"]["tf32"] is True
    assert timed["im2col"]["tf32"] is None
    assert set(plain["unavailable"]) == {"gemm", "cpp", "numba"}
    for profile in plain["profiles"]:
        assert profile["profile"]["queued"]
        assert profile["rows"][-1]["label"] == "GPU waits for the host"
    assert [run["network"] for run in plain["training"]] == ["lstm", "cnn", "cnn"]
    assert not any("graph" in run["path"] or "tf32" in run["path"] for run in plain["training"])
    assert plain["machine"]["peak_flops"] == plain["machine"]["matrix_rates"]["TF32"]
    page = (tmp_path / "report.html").read_text()
    for text in ("Pretended GPU", "9.0, 132 multiprocessors", "+ CUDA graph", "caching", "tf32 off"):
        assert text in page, text
    for text in (page, result.output):
        for word in ("pages kept", "pages returned", "pages cached", "age faults", "as installed", "FMA peak"):
            assert word not in text, word


@pytest.mark.usefixtures("pretended")
def test_a_path_that_fails_on_a_gpu_is_left_out_and_named(volumes, monkeypatch):
    problem = ConvProblem.parse("cuda-float32-ncdhw-n1ic2oc3-i4-k3")

    def fail(*args):
        raise failure(problem, "forward", "triton", RuntimeError("no such instruction"), [])

    monkeypatch.setattr(TritonLaunches, "forward", fail)
    comparison = compare._Comparison(Settings(data=volumes, batch_size=4, device="cuda"), Console(quiet=True))
    data = load_npz(volumes)
    specs = lineup.lineup({"triton": ["ncdhw"]}, [], "cuda")
    found = comparison._candidates(data, *comparison._batch(data), specs)
    assert "triton" not in {one.spec.backend for one in found}
    assert "no such instruction" in comparison.result.unavailable["triton"]
    monkeypatch.setattr(AtenBackend, "forward", fail)
    named = replace(comparison.settings, backends=("triton",))
    with pytest.raises(RuntimeError, match="no such instruction"):
        compare._Comparison(named, Console(quiet=True))._candidates(data, *comparison._batch(data), specs)


def test_cudnn_is_at_its_best_on_a_gpu_only_and_as_before_afterwards(monkeypatch):
    seen = []
    monkeypatch.setattr(compare._Comparison, "run", lambda self: seen.append(torch.backends.cudnn.benchmark))
    for device in ("cpu", "cuda"):
        compare.compare(Settings(device=device), Console(quiet=True))
    assert (seen, torch.backends.cudnn.benchmark) == ([False, True], False)


def test_lineup_on_a_gpu(monkeypatch):
    needs = [(ConvProblem.parse("cuda-float32-ncdhw-n2ic16oc24-i5x6x7-k3-p1-bias"), pass_) for pass_ in PASSES]
    monkeypatch.setattr(lineup, "fuses", lambda name, needs, layout: name == "triton" and layout == "ndhwc")
    specs = lineup.lineup({"triton": ["ncdhw", "ndhwc"], "im2col": ["ncdhw"]}, needs, "cuda")
    ours = [(several[0].path, len(several)) for several in specs if several[0].ours]
    assert ours == [
        ("triton", 2),
        ("triton fused, dense backward", 1),
        ("triton fused", 1),
        ("triton, tf32 off", 2),
        ("triton fused, tf32 off", 1),
        ("triton fused, graph", 1),
        ("im2col", 1),
        ("im2col, graph", 1),
    ]
    graph = next(several[0] for several in specs if several[0].path == "triton fused, graph")
    assert (graph.tf32, graph.graph, graph.fused, graph.dense_backward) == (True, True, True, False)


def test_convolutions_follow_the_switch_of_their_path():
    problem = ConvProblem.parse("cuda-float32-ncdhw-n2ic16oc24-i5x6x7-k3-p1")
    before = torch.backends.cudnn.conv.fp32_precision
    for tf32, dtype in ((True, "float16"), (False, "float32")):
        with steps.on_path(steps.PathSpec("triton", "cnn", "triton", "ncdhw", tf32=tf32)):
            assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if tf32 else "ieee")
            assert TritonImplicitGemm().accuracy(problem, "forward").accumulate_dtype == dtype
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_resident_volumes_are_the_same_batches(volumes):
    from pyvolconv.train.data import batches

    data = load_npz(volumes)
    there = ResidentDataset(data.train, torch.device("cpu"))
    orders = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(2):
        pairs = zip(batches(data.train, 7, orders[0]), batches(there, 7, orders[1]), strict=True)
        for (x, y), (other_x, other_y) in pairs:
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
    assert all(torch.equal(a, b) for a, b in zip(there[5], data.train[5], strict=True))


@pytest.mark.usefixtures("pretended")
def test_volumes_stay_on_the_host_where_a_gpu_has_no_room(volumes, monkeypatch):
    data = load_npz(volumes)
    assert isinstance(resident(data, "cuda").test, ResidentDataset)
    assert resident(data, "cuda").fingerprint() == data.fingerprint()
    assert resident(data, "cpu") is data
    taken = 4 * 40 * 6 * 8 * 10
    for free, fits in ((4 * taken, True), (4 * taken - 4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None, free=free: (free, free))
        assert (resident(data, "cuda") is not data) == fits


def test_training_on_a_gpu_reads_losses_in_bunches_and_learns_the_same(volumes, monkeypatch):
    data = load_npz(volumes)
    config = TrainConfig(batch_size=2, max_epochs=2, learning_rate=1e-3, target_accuracy=1.0)

    def history():
        result = train(build("cnn", SIZE), data, config)
        return [(one.samples, one.train_loss, one.train_accuracy, one.validation_accuracy) for one in result.history]

    expected = history()
    pretend_cuda.install(monkeypatch)
    reads = []
    from pyvolconv.train import loop

    read = loop._Run._read
    monkeypatch.setattr(loop._Run, "_read", lambda self, bar: reads.append(len(self.unread)) or read(self, bar))
    assert history() == expected
    steps_per_epoch = -(-len(data.train) // 2)
    assert sum(reads) == len(expected) * steps_per_epoch
    assert max(reads) == loop.STEPS_UNREAD


@pytest.mark.usefixtures("pretended")
def test_profile_tune_and_info_on_a_gpu(monkeypatch):
    run = CliRunner()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(steps, "MISSION_SIZE", SIZE)
    monkeypatch.setattr("pyvolconv.train.steps.build", lambda name, seed: build(name, SIZE, seed=seed))
    profile = run.invoke(app, ["profile", "cnn", "--device", "cuda", "--backend", "im2col", "--batch-size", "2"])
    assert profile.exit_code == 0, profile.output
    assert "Faults" not in profile.output
    assert "im2col, batch 2" in profile.output
    # Each would run in the interpreter.
    for backend in pyvolconv.backends():
        monkeypatch.setattr(type(backend), "configurations", lambda self, problem, pass_: ())
    monkeypatch.setattr(
        "pyvolconv.autotune.measure_queued", lambda steps, _: {name: 1e-3 * len(name) for name in steps}
    )
    tune = run.invoke(app, ["tune", "cnn", "--input", "2,1,6,8,10", "--device", "cuda"])
    assert tune.exit_code == 0, tune.output
    assert "cuda-float32" in tune.output
    info = run.invoke(app, ["info"])
    assert info.exit_code == 0, info.output
    for text in (
        "Pretended GPU (device 0 of 2",
        "9.0, 132 multiprocessors",
        "8.0 GiB",
        "TMA",
        "on the GPU, for these",
    ):
        assert text in info.output, text
