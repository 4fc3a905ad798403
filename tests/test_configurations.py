"""A backend that can launch its kernels in several ways: which ones are timed, which one is taken, what is kept."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import threading

import pytest
import torch
from rich.console import Console

import pyvolconv
from pyvolconv import autotune, candidates, dispatch, info, tune_model, tuned
from pyvolconv.autotune import time_pass, tune
from pyvolconv.backends import registry, sources
from pyvolconv.backends.base import Backend
from pyvolconv.backends.cpp import CppDirect
from pyvolconv.cost import busy
from pyvolconv.problem import ConvProblem

from .harness import EXTENSION, MISSING

PROBLEM = ConvProblem.parse("cpu-float32-ncdhw-n2ic8oc8-i4x5x6-k3-p1")
FUSED = ConvProblem.parse("cpu-float32-ncdhw-n2ic8oc8-i4x5x6-k3-p1-bias-relu-pool2")
LABELS = ["tunable", "tunable@small", "tunable@large", "tunable@odd"]


class Tunable(CppDirect):
    """cpp.direct with three configurations, which notes who was compiled and who computed."""

    name = family = "tunable"

    def __init__(self):
        self.known = ("small", "large", "odd")
        self.broken, self.compiled, self.ran = (), [], []

    def configurations(self, problem, pass_):
        return self.known if pass_ == "forward" else ()

    def prepare(self, problem, pass_):
        self.compiled.append(self.label)

    def forward(self, problem, *args):
        self.ran.append(self.label)
        if self.configuration in self.broken:
            raise RuntimeError("out of shared memory")
        return super().forward(problem, *args)


@pytest.fixture
def tunable(monkeypatch):
    if EXTENSION is None:
        pytest.skip(MISSING)
    backend = Tunable()
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for module in (dispatch, registry):
        monkeypatch.setattr(module, "REGISTRY", (backend, *registry.REGISTRY))
    dispatch.forget_choices()
    return backend


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="pyvolconv")
    return lambda: [record.getMessage() for record in caplog.records]


def rigged(**seconds):
    """Says that a configuration took the seconds given for it, and everybody else one second."""

    def measure(steps, _):
        return {label: seconds.get(label.partition("@")[2] or label, 1.0) for label in steps}

    return measure


def test_configurations_of_every_backend_are_short_texts(backend, pass_):
    for problem in (PROBLEM, PROBLEM.with_(device="cuda", dtype="bfloat16", layout="ndhwc")):
        texts = backend.configurations(problem, pass_)
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert re.fullmatch(r"[\w+.-]+", text, re.ASCII)
            assert backend.configured(text).label == f"{backend.name}@{text}"
    assert backend.label == backend.name


def test_a_configured_backend_is_a_copy_under_the_same_name():
    backend = CppDirect()
    other = backend.configured("small")
    assert (other.name, other.configuration, other.label) == ("cpp.direct", "small", "cpp.direct@small")
    assert (backend.configuration, backend.label) == ("", "cpp.direct")
    assert other.configured("large").label == "cpp.direct@large"


def test_configurations_are_timed_beside_the_backends_own_choice(tunable):
    one = time_pass(PROBLEM, "forward", measure=rigged())
    assert [label for label in one.milliseconds if label.startswith("tunable")] == LABELS
    assert {"cpp.direct", "aten"} <= set(one.milliseconds)
    one = time_pass(PROBLEM, "grad_input", measure=rigged())
    assert [label for label in one.milliseconds if label.startswith("tunable")] == ["tunable"]


def test_each_step_runs_its_configuration(tunable):
    def measure(steps, _):
        for label, step in steps.items():
            tunable.ran.clear()
            step()
            assert tunable.ran == ([label] if label.startswith("tunable") else [])
        return dict.fromkeys(steps, 1.0)

    assert len(time_pass(PROBLEM, "forward", measure=measure).milliseconds) > len(LABELS)


def test_their_number_is_bounded(tunable):
    tunable.known = tuple(f"c{number}" for number in range(50))
    one = time_pass(PROBLEM, "forward", measure=rigged())
    expected = [f"tunable@c{number}" for number in range(candidates.MOST_CONFIGURATIONS)]
    assert [label for label in one.milliseconds if "@" in label] == expected


def test_the_fastest_configuration_runs_from_then_on(tunable):
    (one,) = tune([(PROBLEM, "forward")], measure=rigged(large=0.1))
    assert (one.winner, one.speed_up) == ("tunable@large", pytest.approx(10))
    chosen = dispatch.choose(PROBLEM, "forward")
    assert (chosen.name, chosen.configuration) == ("tunable", "large")
    tunable.ran.clear()
    x, weight = torch.randn(PROBLEM.input_shape), torch.randn(PROBLEM.weight_shape)
    y = pyvolconv.conv3d(x, weight, padding=1)
    assert tunable.ran == ["tunable@large"]
    torch.testing.assert_close(y, torch.nn.functional.conv3d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
    for name, expected in (("tunable", "tunable@large"), ("cpp.direct", "cpp.direct")):
        with pyvolconv.use_backend(name):
            assert dispatch.choose(PROBLEM, "forward").label == expected


def test_the_backends_own_choice_may_be_the_fastest(tunable):
    tune([(PROBLEM, "forward")], measure=rigged(tunable=0.1, large=0.2))
    assert dispatch.choose(PROBLEM, "forward").label == "tunable"


def test_a_fused_pass_is_put_together_only_where_no_configuration_is_faster(tunable):
    tune([(FUSED, "forward")], measure=rigged(aten=0.5, large=0.1))
    assert dispatch.choose_or_none(FUSED, "forward").label == "tunable@large"
    tune([(FUSED, "forward")], measure=rigged(aten=0.05, large=0.1), again=True)
    assert dispatch.choose_or_none(FUSED, "forward") is None


def test_fastest_among_some(tunable):
    able = [backend for backend in dispatch.able_backends(PROBLEM, "forward") if backend.ours]
    assert dispatch.fastest(PROBLEM, "forward", able) is dispatch.expected_fastest(PROBLEM, "forward", able)
    tuned.remember({(PROBLEM, "forward"): {"aten": 0.1, "tunable@odd": 0.2, "cpp.direct": 0.3}})
    assert dispatch.fastest(PROBLEM, "forward", able).label == "tunable@odd"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(tuned.OFF_VARIABLE, "")
    return tmp_path / "tuned.json"


def as_new_process():
    tuned.forget()
    dispatch.forget_choices()


def test_the_next_process_takes_it_too(tunable, file, warnings):
    tune([(PROBLEM, "forward")], measure=rigged(large=0.1))
    (entry,) = json.loads(file.read_text())["measured"]
    assert entry["milliseconds"][str(PROBLEM)]["forward"]["tunable@large"] == 100.0
    as_new_process()
    assert dispatch.choose(PROBLEM, "forward").label == "tunable@large"
    assert warnings() == []


@pytest.mark.parametrize("stale", ["tunable@gone", "tunable@", "tunable@small@odd", "gone@small", "@"])
def test_a_configuration_that_is_not_known_is_ignored(tunable, file, warnings, stale):
    tuned.remember({(PROBLEM, "forward"): {stale: 0.1, "tunable@odd": 0.2, "aten": 0.3}})
    as_new_process()
    assert dispatch.choose(PROBLEM, "forward").label == "tunable@odd"
    tuned.remember({(PROBLEM, "forward"): {stale: 0.1}})
    as_new_process()
    able = dispatch.able_backends(PROBLEM, "forward")
    assert dispatch.choose(PROBLEM, "forward") is dispatch.expected_fastest(PROBLEM, "forward", able)
    assert warnings() == []


def test_a_configuration_that_fails_is_left_out_and_that_is_said(tunable, warnings):
    tunable.broken = ("small",)
    (one,) = tune([(PROBLEM, "forward")], measure=rigged(small=0.01, large=0.1))
    assert "tunable@small" not in one.milliseconds
    assert one.winner == "tunable@large"
    (warning,) = warnings()
    assert warning == (
        f"a configuration is left out of tuning: forward of {PROBLEM}: backend 'tunable@small' failed with "
        "RuntimeError: out of shared memory"
    )


def test_a_backend_that_fails_in_its_own_choice_is_an_error(tunable):
    tunable.broken = ("",)
    with pytest.raises(pyvolconv.BackendError, match=r"backend 'tunable' failed with RuntimeError"):
        time_pass(PROBLEM, "forward")


def test_kernels_are_compiled_side_by_side_before_anything_runs(tunable, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: len(LABELS))
    together = threading.Barrier(len(LABELS), timeout=10)

    def prepare(self, problem, pass_):
        assert (problem, pass_, self.ran) == (PROBLEM, "forward", [])
        together.wait()
        self.compiled.append(self.label)

    monkeypatch.setattr(Tunable, "prepare", prepare)
    time_pass(PROBLEM, "forward", measure=rigged())
    assert sorted(tunable.compiled) == sorted(LABELS)


def test_what_cannot_be_compiled_shows_when_it_runs(tunable, monkeypatch):
    def prepare(self, problem, pass_):
        raise ValueError("no such instruction")

    monkeypatch.setattr(Tunable, "prepare", prepare)
    assert LABELS[1] in time_pass(PROBLEM, "forward", measure=rigged()).milliseconds


def test_nothing_is_compiled_for_known_times(tunable):
    tune([(PROBLEM, "forward")], measure=rigged())
    tunable.compiled.clear()
    (one,) = tune([(PROBLEM, "forward")], measure=rigged())
    assert one.reused
    assert tunable.compiled == []


def test_most_backends_have_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(candidates, "ThreadPoolExecutor", lambda *_: pytest.fail("threads for nothing"))
    candidates.prepare([CppDirect(), CppDirect().configured("small")], PROBLEM, "forward")
    assert Backend.prepare(CppDirect(), PROBLEM, "forward") is None


def test_the_table_of_tune_names_it(tunable):
    found = tune([(PROBLEM, "forward")], measure=rigged(large=0.1))
    console = Console(file=io.StringIO(), width=140)
    tune_model.print_tuned(console, found)
    (line,) = (line for line in console.file.getvalue().splitlines() if "forward" in line)
    assert line.split()[2:4] == ["tunable@large", "100"]


def test_times_of_a_gpu_depend_on_the_kernels_that_are_compiled_at_run_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    digests = []
    for version in ("3.6.0", "3.7.0", "3.6.0"):
        monkeypatch.setattr(sources, "version", lambda package, version=version: version)
        sources.sources_digest.cache_clear()
        digests.append(tuned.current_setting("cuda").extension)
    sources.sources_digest.cache_clear()
    assert digests[0] == digests[2] != digests[1]
    assert tuned.current_setting("cuda").processor == "Some GPU"
    assert tuned.current_setting("cpu").extension not in digests


def test_times_of_other_kernels_on_this_gpu_are_reported(monkeypatch, file, warnings):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(tuned, "sources_digest", lambda: "older")
    on_gpu = PROBLEM.with_(device="cuda")
    tuned.remember({(on_gpu, "forward"): {"aten": 1.0}})
    as_new_process()
    assert tuned.milliseconds(on_gpu, "forward") == {"aten": 1.0}
    assert tuned.count("cuda") == 1
    assert warnings() == []
    monkeypatch.setattr(tuned, "sources_digest", lambda: "newer")
    as_new_process()
    assert tuned.milliseconds(on_gpu, "forward") == {}
    (warning,) = warnings()
    assert "measured with another build or version" in warning


def test_a_gpu_needs_one_core_of_the_machine(monkeypatch, file, threads, warnings):
    threads(2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    # Others keep one of two cores busy.
    samples = itertools.count()
    monkeypatch.setattr(busy, "sample", lambda: busy.Sample(n := float(next(samples)), n, 2 * n, 2))
    for device, kept in (("cuda", True), ("cpu", False)):
        one = autotune.Tuned(PROBLEM.with_(device=device), "forward", {"aten": 1.0}, "aten", reused=False)
        (remembered,) = autotune._remember([one], busy.sample(), even_if_busy=False)
        assert remembered.kept is kept
        assert len(warnings()) == (not kept)


def test_info_counts_the_problems_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    tuned.remember({(PROBLEM.with_(device="cuda", batch=batch), "forward"): {"aten": 1.0} for batch in (1, 2)})
    assert info._tuned().startswith("0 problems for these threads")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert info._tuned().startswith("0 problems on the CPU, 2 on the GPU, for these threads")


def test_configurations_are_measured_in_turns_like_everybody(tunable):
    (one,) = tune([(PROBLEM, "forward")], measure=autotune.measure_alternating)
    assert set(LABELS) <= set(one.milliseconds)
    assert min(one.milliseconds.values()) > 0
