"""The parts of `benchmarks.gpu_suite` that need no GPU: its entries, its check of results, what it says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from pyvolconv.backends.aten import AtenBackend
from pyvolconv.backends.cpp import CppDirect
from pyvolconv.problem import PASSES, ConvProblem

from .harness import EXTENSION, MISSING

sys.path.insert(0, str(Path(__file__).parent.parent))
try:
    from benchmarks import gpu_compile, gpu_problems, gpu_suite
    from benchmarks.gpu_check import Reference
    from benchmarks.gpu_rows import Row, Time, summary, table, to_json
    from benchmarks.gpu_timing import Runner, time_in_turns
finally:
    sys.path.pop(0)

ATEN = AtenBackend()
PROBLEMS = (
    "n2ic9oc10-i4x5x6-k3x2x3-s2x1x3-p1x0x2-d1x2x1",
    "n3g4ic8oc12-i4x4x5-k3x1x2-p2+0x0x1",
    "n5g9ic9oc9-i5x4x6-k3-s1x2x2-p1",
    "n300ic3oc8-i2x4x4-k2x4x4-s2x4x4",
)


def test_every_entry_is_a_convolution():
    problems = {name: gpu_problems.gpu_problem(name, "ndhwc") for name in gpu_problems.GPU_PROBLEMS}
    assert {(problem.device, problem.layout) for problem in problems.values()} == {("cuda", "ndhwc")}
    assert len(set(problems.values())) == len(problems)
    patches = [name for name, problem in problems.items() if problem.output_size == (1, 1, 1)]
    assert patches == ["qwen2-vl", "minimax-m3"]
    assert max(problem.min_bytes("forward") for problem in problems.values()) < 10e9
    with pytest.raises(ValueError, match=r"no entry 'wan'; expected one of: qwen2-vl"):
        gpu_problems.gpu_problem("wan", "ndhwc")


@pytest.mark.parametrize("text", PROBLEMS)
@pytest.mark.parametrize("pieces", [False, True])
def test_the_reference_is_the_convolution(operands, run_pass, monkeypatch, text, pass_, pieces):
    if pieces:
        monkeypatch.setattr(sys.modules[Reference.__module__], "MOST_BYTES", 1)
    problem = ConvProblem.parse(f"cpu-float64-ndhwc-{text}")
    args = operands(problem, pass_)
    exact = run_pass(ATEN, problem, pass_, args)
    reference = Reference(problem, pass_, args)
    torch.testing.assert_close(reference._part(exact), reference.exact, rtol=1e-12, atol=1e-12)
    assert (reference.magnitude >= reference.exact.abs()).all()


def test_the_reference_tells_right_from_wrong(operands, run_pass, pass_):
    problem = ConvProblem.parse("cpu-float32-ncdhw-n2ic20oc20-i4x5x6-k3-p1")
    args = operands(problem, pass_)
    reference = Reference(problem, pass_, args)
    result = run_pass(ATEN, problem, pass_, args)
    accuracy = ATEN.accuracy(problem, pass_)
    assert reference.error(result, accuracy) <= 1
    for value in (float("nan"), result.flatten()[-1] + 0.1):
        wrong = result.clone()
        wrong.view(-1)[-1] = value
        assert reference.error(wrong, accuracy) > 1
    # What a tap that is left out leaves.
    without = [args[0], args[1].clone()]
    if pass_ == "grad_weight":
        without[1][..., 0] = 0
    else:
        without[1][..., 0, 0, 0] = 0
    assert reference.error(run_pass(ATEN, problem, pass_, without), accuracy) > 1


def row(pass_="forward", ours=(2e-3, 1e-3), peer=(3e-3, 4e-3), **more):
    text = "cuda-bfloat16-ncdhw-n1ic16oc16-i8-k3"
    layouts = ("ncdhw", "ndhwc")
    times = {
        "ours": {layout: Time(seconds, "triton") for layout, seconds in zip(layouts, ours, strict=False)},
        "torch": {layout: Time(seconds, "aten") for layout, seconds in zip(layouts, peer, strict=False)},
        "chosen": dict.fromkeys(layouts, "triton"),
        "reproducible": dict.fromkeys(layouts, True),
    }
    return Row("entry", pass_, text, 10**9, 10**6, 1e15, **times | more)


def test_ratios_are_of_the_better_layouts():
    assert row().ratios == pytest.approx({"ratio": 3.0, "ncdhw": 1.5, "+aten": 3.0})
    chosen = {"ncdhw": "aten", "ndhwc": "aten"}
    assert row(chosen=chosen).ratios == pytest.approx({"ratio": 3.0, "ncdhw": 1.5, "+aten": 1.0})
    assert row(ours=(2e-3,)).ratios["ratio"] == pytest.approx(1.5)


@pytest.mark.parametrize("fault", [{"error": {"ncdhw": 1.5}}, {"difference": {"ndhwc": 0.5}}])
def test_a_wrong_result_has_no_speed(fault):
    wrong = row("grad_input", **fault)
    assert set(wrong.ratios.values()) == {None}
    assert "WRONG" in str(wrong)
    assert "WRONG" in table([row(), wrong])
    assert "WRONG: entry grad_input" in summary([row(), wrong])
    assert "WRONG" not in summary([row()])


def test_what_is_not_the_same_twice_is_named():
    assert "NOT REPRODUCIBLE: entry forward" in summary([row(reproducible={"ncdhw": False})])


def test_samples_go_on_until_the_time_is_over_or_the_call_is_long():
    def slow(operand):
        seen.append(operand)

    seen = []
    runner = Runner(slow, [[torch.zeros(1)], [torch.ones(1)]])
    runner.start()
    time_in_turns([runner], 1e-4)
    assert runner.calls >= 5
    assert {float(operand) for operand in seen} == {0.0, 1.0}
    runner.samples, runner.calls = [0.5], 1
    assert runner.finished(10.0)
    runner.samples, runner.calls = [1e-3], 4
    assert not runner.finished(0.0)


class Broken(CppDirect):
    """In the forward pass loses the last channel, or returns other bits each time, where it is told to."""

    fault = ""
    calls = 0

    def forward(self, problem, *args):
        result = super().forward(problem, *args)
        self.calls += 1
        if self.fault == "lost":
            result[:, -1] = 0
        if self.fault == "restless":
            result *= 1 + 1e-6 * (self.calls % 2)
        return result


@pytest.mark.parametrize("fault", ["", "lost", "restless"])
def test_a_measurement_on_the_cpu(monkeypatch, fault):
    if EXTENSION is None:
        pytest.skip(MISSING)
    monkeypatch.setitem(gpu_problems.GPU_PROBLEMS, "small", "float32-n2g2ic6oc4-i4x5x6-k3-p1")
    backend = Broken()
    backend.fault = fault
    monkeypatch.setattr(gpu_suite, "ours", lambda problem, pass_: [backend])
    rows = list(gpu_suite.measure_all([("small", pass_) for pass_ in PASSES], float("inf"), 1e-3, False, "cpu", 16))
    assert [one.pass_ for one in rows] == list(PASSES)
    for one in rows:
        wrong = fault == "lost" and one.pass_ == "forward"
        assert one.wrong == wrong
        assert bool(one.failures) == wrong
        assert (one.ratios["ratio"] is None) == wrong
        assert all(one.reproducible.values()) == (fault != "restless" or one.pass_ != "forward")
    assert len(json.loads(to_json(rows, {"gpu": "none"}))["rows"]) == 3
    assert list(gpu_suite.measure_all([("small", "forward")], 0.0, 1e-3, False, "cpu", 16)) == []


def test_compilation_in_other_processes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    good = ("cpp.direct", "", "cpu-float32-ncdhw-n1ic2oc2-i4-k3", "forward")
    bad = ("cpp.direct", "m16", "no problem", "forward")
    failed = gpu_compile.compile_all([good, bad], 60.0)
    assert list(failed) == [bad]
    assert "is not a convolution problem" in failed[bad]
    assert gpu_compile.compile_all([], 0.0) == {}


def test_only_what_compiles_at_run_time_is_compiled_before(monkeypatch):
    class Compiling(CppDirect):
        def prepare(self, problem, pass_):
            raise NotImplementedError

    backends = [CppDirect(), Compiling().configured("small")]
    monkeypatch.setattr(gpu_suite, "ours", lambda problem, pass_: backends)
    jobs = gpu_suite.jobs_of([("nnunet-32", "forward")], False)
    texts = [str(gpu_problems.gpu_problem("nnunet-32", layout)) for layout in ("ncdhw", "ndhwc")]
    assert jobs == [("cpp.direct", "small", text, "forward") for text in texts]
