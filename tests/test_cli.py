"""The command line: what it says, how it fails, how it ends."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pyvolconv
from pyvolconv.cli import app
from pyvolconv.cost import busy
from pyvolconv.info import backend_infos, installation

COMMANDS = ("compare", "info", "profile", "tune")


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], terminal_width=200)


def test_help_names_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"pyvolconv {pyvolconv.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command in result.output


def test_module_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "pyvolconv", "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert "compare" in done.stdout


def test_info_names_every_backend_and_why_it_cannot_run(run):
    result = run("info")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    able = {info.name: info for info in backend_infos() if info.device == "cpu"}
    assert list(able) == [backend.name for backend in pyvolconv.backends()]
    for name, info in able.items():
        assert name in words
        assert (f"no: {info.reason.split()[0]}" if info.reason else f"yes{info.scope and ', ' + info.scope}") in words
    assert (able["numba"].scope, able["numba"].reason) == ("", "")
    if not able["cpp.direct"].reason:
        assert able["cpp.first_layer"].scope == "from 1 channel"
        assert able["cpp.widened"].scope == "float16"
    for label in ("versions", "instruction set", "threads", "OpenMP", "GPU", "cache", "forced backend"):
        assert label in words


def test_info_says_which_backend_is_forced(monkeypatch):
    monkeypatch.delenv("PYVOLCONV_BACKEND", raising=False)
    assert installation()["forced backend"] == "none"
    monkeypatch.setenv("PYVOLCONV_BACKEND", "im2col")
    assert installation()["forced backend"] == "im2col, by PYVOLCONV_BACKEND"
    monkeypatch.setenv("PYVOLCONV_BACKEND", "im2cool")
    assert "PYVOLCONV_BACKEND=im2cool: " in installation()["forced backend"]
    assert "im2col" in installation()["forced backend"]


def test_tune_refuses_a_name_before_it_asks_for_sizes(run):
    assert "'cnm' names no model" in run("tune", "cnm").output
    assert "No module named 'no_such_package'" in run("tune", "no_such_package:model").output
    assert "--input N,C,D,H,W" in run("tune", "torch.nn:Identity").output


def test_info_says_why_a_backend_cannot_run(monkeypatch):
    (direct,) = (backend for backend in pyvolconv.backends() if backend.name == "cpp.direct")
    monkeypatch.setattr(type(direct), "unsupported_reasons", lambda self, problem, pass_: ["no compiler", "no luck"])
    (info,) = (info for info in backend_infos() if info.name == "cpp.direct" and info.device == "cpu")
    assert (info.scope, info.reason) == ("", "no compiler; no luck")


def volumes(path: Path, **changes) -> Path:
    arrays = {
        "x": np.random.default_rng(0).random((12, 8, 8, 8), dtype=np.float32),
        "y": np.arange(12) % 2,
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def with_nan() -> np.ndarray:
    x = np.zeros((12, 8, 8, 8), np.float32)
    x[3, 1, 2, 3] = np.nan
    return x


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": None}, "x"),
        ({"y": None}, "y"),
        ({"x": np.zeros((12, 8, 8), np.float32)}, "(12, 8, 8)"),
        ({"y": np.zeros(11, np.int64)}, "11"),
        ({"x": with_nan()}, "NaN"),
        ({"y": np.full(12, -1)}, "-1"),
    ],
    ids=["no x", "no y", "x not 4-D", "y too short", "NaN", "label out of range"],
)
def test_bad_data_is_one_line_and_status_2(run, tmp_path, changes, said):
    path = volumes(tmp_path / "volumes.npz", **changes)
    assert_one_line(run("compare", "--quick", "--data", path, "--out", tmp_path / "out"), said)


def test_missing_data_file_is_one_line_and_status_2(run, tmp_path):
    path = tmp_path / "nothing.npz"
    assert_one_line(run("compare", "--data", path, "--out", tmp_path / "out"), "nothing.npz")


def test_unwritable_folder_is_one_line_and_status_2(run, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    assert_one_line(run("compare", "--out", blocker / "report"), "--out")


def test_unknown_backend_is_one_line_and_status_2(run, tmp_path):
    assert_one_line(run("compare", "--backends", "cpp,nonsense", "--out", tmp_path), "nonsense")
    assert_one_line(run("profile", "cnn", "--backend", "nonsense", "--batch-size", "1"), "nonsense")


def test_named_path_that_cannot_run_is_one_line_and_status_2(run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = ("compare", "--quick", "--backends", "cpp,triton", "--data", volumes(tmp_path / "volumes.npz"))
    assert_one_line(run(*asked, "--out", tmp_path / "report"), "triton cannot run here")


@pytest.fixture
def rigged(monkeypatch):
    """No clock is read: what runs first wins, torch takes twice as long."""
    monkeypatch.setattr(
        "pyvolconv.autotune.measure_alternating",
        lambda steps, _: {name: 2e-3 if name == "aten" else 1e-3 for name in steps},
    )


@pytest.mark.usefixtures("rigged")
def test_tune_shows_every_pass_and_sums_up(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("tune", "cnn", "--input", "2,1,9,10,11")
    assert result.exit_code == 0, result.output
    words = result.stdout
    assert words.count("bias-relu-pool2ceil") == words.count(" forward ") == 3
    assert (words.count(" grad_input "), words.count(" grad_weight ")) == (2, 3)
    assert "n2ic1oc16-i9x10x11-k3-p1-bias-relu-pool2ceil" in words
    assert "8 passes, 0 of them timed before: 2.00x torch in the geometric mean" in words
    assert "PYVOLCONV_NO_CACHE" in words
    assert "8 of them timed before" in run("tune", "cnn", "--input", "2,1,9,10,11").output
    assert "0 of them timed before" in run("tune", "cnn", "--input", "2,1,9,10,11", "--again").output


@pytest.mark.usefixtures("rigged")
def test_tune_says_where_times_are_kept(run, tmp_path, monkeypatch):
    monkeypatch.delenv("PYVOLCONV_NO_CACHE")
    monkeypatch.setenv("PYVOLCONV_CACHE_DIR", str(tmp_path))
    load = busy.Load(1.5, 2)
    monkeypatch.setattr(busy, "disturbance", lambda *_: load)
    asked = ("tune", "cnn", "--input", "2,1,9,10,11", "--again")
    assert "Not kept, as other processes kept cores busy" in run(*asked).output
    assert list(tmp_path.iterdir()) == []
    assert f"Kept in {tmp_path}" in run(*asked, "--even-if-busy").output
    load = None
    assert f"Kept in {tmp_path}" in run(*asked).output


@pytest.mark.usefixtures("rigged")
def test_tune_of_a_model_by_name(run, tmp_path, monkeypatch):
    (tmp_path / "mine_to_tune.py").write_text(
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv3d(2, 4, 3)\n"
        "    def forward(self, x, scale):\n"
        "        return self.conv(x) * scale\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    asked = ("tune", "mine_to_tune:Two", "--input", "1,2,5,6,7", "--input", "1", "--dtype", "float64")
    result = run(*asked, "--channels-last", "--inference")
    assert result.exit_code == 0, result.output
    assert "cpu-float64-ndhwc" in result.output
    assert "1 pass, 0 of them timed before" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense", "--input", "1"], "'package.module:callable'"),
        (["no_such_module:f", "--input", "1"], "no_such_module"),
        (["os:nothing", "--input", "1"], "os has no nothing"),
        (["os:sep", "--input", "1"], "str"),
        (["torch.nn:Identity"], "--input"),
        (["cnn", "--input", "2,-1"], "2,-1"),
        (["cnn", "--input", "2,3"], "five sizes, N,C,D,H,W"),
        (["cnn", "--input", "1x1x8x8"], "--input 1x1x8x8: cnn takes one input"),
        (["torch.nn:Flatten", "--input", "2"], "does not run on --input 2: Dimension out of range"),
        (["cnn", "--dtype", "int8"], "int8"),
    ],
)
def test_what_tune_cannot_run_is_one_line_and_status_2(run, arguments, said):
    assert_one_line(run("tune", *arguments), said)


def test_a_model_that_fails_without_a_word(run, tmp_path, monkeypatch):
    (tmp_path / "mine_to_fail.py").write_text(
        "from torch import nn\nclass Fails(nn.Module):\n    def forward(self, x):\n        raise NotImplementedError\n"
    )
    monkeypatch.chdir(tmp_path)
    assert_one_line(run("tune", "mine_to_fail:Fails", "--input", "2"), "does not run on --input 2: NotImplementedError")


def test_tune_of_a_model_without_convolutions(run):
    result = run("tune", "torch.nn:Identity", "--input", "2,3")
    assert (result.exit_code, "no convolution" in result.output) == (0, True)


def test_missing_gpu_is_one_line_and_status_2(run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_line(run("compare", "--device", "cuda", "--out", tmp_path), "no CUDA device")


def assert_one_line(result, said):
    assert result.exit_code == 2, result.output
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("pyvolconv: ")
    assert said in last
    assert not any(line.startswith("pyvolconv: ") for line in before), result.stderr
    assert "Traceback" not in result.output
