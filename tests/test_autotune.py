"""Measured choices: who is timed, who is taken and what is kept; by rigged clocks alone."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

import pyvolconv
from pyvolconv import dispatch, tuned, tuned_file
from pyvolconv.autotune import time_pass, tune
from pyvolconv.cost import busy
from pyvolconv.problem import ConvProblem

from .rigged import rigged

PLAIN = ConvProblem.parse("cpu-float32-ncdhw-n2ic16oc16-i4x5x6-k3-p1-bias")
FUSED = ConvProblem.parse("cpu-float32-ndhwc-n2ic8oc8-i4x5x6-k3-p1-bias-leaky_relu-pool2ceil")


@pytest.mark.parametrize("case", [PLAIN, PLAIN.with_(layout="ndhwc", groups=2), PLAIN.with_(dtype="float64")], ids=str)
def test_every_able_automatic_backend_is_timed(case, pass_):
    one = time_pass(case, pass_, measure=rigged())
    able = [b for b in pyvolconv.backends() if b.automatic and not b.unsupported_reasons(case, pass_)]
    # Triton is next to hopeless in its interpreter.
    assert set(one.milliseconds) == {backend.name for backend in able if backend.family != "triton"}
    assert "aten" in one.milliseconds
    assert one.expected == dispatch.choose(case, pass_).name


@pytest.mark.parametrize("case", [PLAIN, PLAIN.with_(layout="ndhwc", in_channels=1), FUSED], ids=str)
def test_candidates_compute_the_same(case, pass_):
    results = {}

    def measure(steps, _):
        results.update({name: step() for name, step in steps.items()})
        return dict.fromkeys(steps, 1.0)

    time_pass(case, pass_, measure=measure)
    assert {"cpp.direct", "aten"} <= set(results)
    values = {name: result[0] if isinstance(result, tuple) else result for name, result in results.items()}
    for name, value in values.items():
        torch.testing.assert_close(value, values["aten"], rtol=1e-3, atol=1e-3, msg=name)
        assert value.is_contiguous(
            memory_format=torch.channels_last_3d if case.layout == "ndhwc" else torch.contiguous_format
        )


def test_the_fastest_is_taken_from_then_on(pass_):
    (one,) = tune([(PLAIN, pass_)], measure=rigged(im2col=0.1))
    assert one.winner == "im2col"
    assert dispatch.choose(PLAIN, pass_).name == "im2col"
    assert one.speed_up == one.regret == pytest.approx(10)
    assert dispatch.choose(PLAIN.with_(batch=3), pass_).name != "im2col"


def test_torch_is_taken_where_it_is_fastest_and_that_is_said(caplog):
    tune([(PLAIN, "forward")], measure=rigged(aten=0.1))
    with caplog.at_level(logging.WARNING, logger="pyvolconv"):
        assert dispatch.choose(PLAIN, "forward").name == "aten"
        assert dispatch.choose(PLAIN, "forward").name == "aten"
    assert [record.getMessage() for record in caplog.records] == [
        f"forward of {PLAIN} runs in ATen (measured to be as fast or faster)"
    ]


@pytest.mark.parametrize("case", [PLAIN, FUSED], ids=str)
@pytest.mark.parametrize(("ours", "taken"), [(0.97, "aten"), (0.95, "cpp.direct")])
def test_torch_is_taken_in_a_tie(case, ours, taken):
    (one, *_) = tune([(case, "forward")], measure=rigged(cpp_direct=ours, cpp_winograd=2.0, cpp_first_layer=2.0))
    assert one.winner == taken
    chosen = dispatch.choose_or_none(case, "forward")
    assert taken == ("aten" if chosen is None else chosen.name)
    assert one.best == 1000 * (1 if taken == "aten" else ours)
    assert one.regret == max(one.milliseconds[one.expected] / one.best, 1)


def test_forced_beats_tuned_and_a_family_is_chosen_from_by_time():
    tune([(PLAIN, "forward")], measure=rigged(im2col=0.1, cpp_direct=0.5, cpp_winograd=0.6))
    for name, expected in (("aten", "aten"), ("cpp", "cpp.direct"), ("cpp.winograd", "cpp.winograd")):
        with pyvolconv.use_backend(name):
            assert dispatch.choose(PLAIN, "forward").name == expected
    tune([(PLAIN, "forward")], measure=rigged(cpp_winograd=0.1), again=True)
    with pyvolconv.use_backend("cpp"):
        assert dispatch.choose(PLAIN, "forward").name == "cpp.winograd"


def test_times_of_backends_that_cannot_run_are_nothing():
    tuned.remember({(PLAIN, "forward"): {"gone": 0.1, "numba": 0.2}})
    dispatch.forget_choices()
    chosen = dispatch.choose(PLAIN, "forward").name
    assert chosen == dispatch.expected_fastest(PLAIN, "forward", dispatch.able_backends(PLAIN, "forward")).name


def test_times_hold_for_their_threads_and_precision_only(threads):
    threads(2)
    tune([(PLAIN, "forward")], measure=rigged(im2col=0.1))
    assert dispatch.choose(PLAIN, "forward").name == "im2col"
    threads(1)
    assert dispatch.choose(PLAIN, "forward").name != "im2col"
    threads(2)
    try:
        pyvolconv.set_precision("high")
        assert dispatch.choose(PLAIN, "forward").name != "im2col"
    finally:
        pyvolconv.set_precision("default")
    assert dispatch.choose(PLAIN, "forward").name == "im2col"


def test_times_hold_for_their_instruction_set_only():
    extension = pytest.importorskip("pyvolconv._C")
    before = extension.current_isa()
    tune([(PLAIN, "forward")], measure=rigged(im2col=0.1))
    try:
        extension.use_isa("baseline")
        dispatch.forget_choices()
        assert (dispatch.choose(PLAIN, "forward").name == "im2col") == (before == "baseline")
    finally:
        extension.use_isa(before)


def test_a_fused_pass_is_put_together_where_that_is_faster(pass_):
    problem = FUSED if pass_ == "forward" else FUSED.with_(bias=pass_ == "grad_weight", activation="none")
    plain = problem.without_epilogue().with_(bias=pass_ == "forward")
    found = tune([(problem, pass_)], measure=rigged(aten=0.1, im2col=0.01))
    assert [(one.problem, one.winner) for one in found] == [(problem, "aten"), (plain, "im2col")]
    assert dispatch.choose_or_none(problem, pass_) is None
    assert dispatch.choose(plain, pass_).name == "im2col"
    with pyvolconv.use_backend("cpp"):
        assert dispatch.choose_or_none(problem, pass_).family == "cpp"
    tune([(problem, pass_)], measure=rigged(aten=2.0), again=True)
    assert dispatch.choose_or_none(problem, pass_).family == "cpp"


def test_put_together_passes_compute_the_same():
    # Whole numbers: sums are exact, and equal voxels of a window are equal in both ways.
    x, w, b = (torch.randint(-3, 4, shape).float() for shape in ((2, 8, 4, 5, 6), (8, 8, 3, 3, 3), (8,)))
    w.requires_grad_()

    def run():
        y = pyvolconv.conv3d_max_pool(x, w, b, padding=1, activation="relu")
        return y, *torch.autograd.grad(y.square().sum(), w)

    with dispatch.listen() as asked:
        fused = run()
    assert {problem.pool is not None for problem, _ in asked} == {True}
    tune(asked, measure=rigged(aten=0.1))
    with dispatch.listen() as asked:
        together = run()
    assert {problem.pool is not None for problem, _ in asked} == {True, False}
    assert all(map(torch.equal, together, fused))


def test_known_times_are_not_taken_again():
    asked = {(PLAIN, "forward")}
    (first,) = tune(asked, measure=rigged(im2col=0.1))
    (second,) = tune(asked, measure=lambda steps, seconds: pytest.fail("timed again"))
    assert (first.reused, second.reused) == (False, True)
    assert second.milliseconds == first.milliseconds
    (third,) = tune(asked, measure=rigged(aten=0.1), again=True)
    assert (third.reused, third.winner) == (False, "aten")


def test_largest_first_and_within_the_time(caplog):
    sizes = [PLAIN.with_(batch=batch) for batch in (1, 4, 2)]
    found = tune([(problem, "forward") for problem in sizes], measure=rigged())
    assert [one.problem.batch for one in found] == [4, 2, 1]
    with caplog.at_level(logging.WARNING, logger="pyvolconv"):
        assert tune([(problem.with_(out_channels=8), "forward") for problem in sizes], 0, measure=rigged()) == []
    (record,) = caplog.records
    assert "3 passes were not timed" in record.getMessage()


@pytest.fixture
def others(monkeypatch, tmp_path, threads):
    """others(cores): that many of two cores are kept busy by other processes from now on; times are kept on disk."""
    monkeypatch.delenv(tuned.OFF_VARIABLE)
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path))
    threads(2)

    def keep_busy(cores):
        samples = itertools.count()
        monkeypatch.setattr(busy, "sample", lambda: busy.Sample(n := float(next(samples)), n, n * (1 + cores), 2))

    return keep_busy


def test_times_of_a_busy_machine_are_used_but_not_kept(others, caplog):
    others(0.8)
    with caplog.at_level(logging.WARNING, logger="pyvolconv"):
        (one,) = tune([(PLAIN, "forward")], measure=rigged(im2col=0.1))
    (record,) = caplog.records
    assert "other processes kept 0.8 of 2 cores busy" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not one.kept
    assert dispatch.choose(PLAIN, "forward").name == "im2col"
    assert tuned_file.read(tuned.location()) == {}
    tuned.forget()
    (again,) = tune([(PLAIN, "forward")], measure=rigged(aten=0.1))
    assert (again.reused, again.winner) == (False, "aten")


@pytest.mark.parametrize(("cores", "even_if_busy", "warnings"), [(0.05, False, 0), (0.8, True, 1)])
def test_times_of_a_quiet_machine_are_kept_and_of_a_busy_one_if_asked(others, caplog, cores, even_if_busy, warnings):
    others(cores)
    with caplog.at_level(logging.WARNING, logger="pyvolconv"):
        (one,) = tune([(PLAIN, "forward")], measure=rigged(im2col=0.1), even_if_busy=even_if_busy)
    assert (one.kept, len(caplog.records)) == (True, warnings)
    tuned.forget()
    assert tuned.milliseconds(PLAIN, "forward")["im2col"] == 100.0
    (again,) = tune([(PLAIN, "forward")], measure=lambda steps, seconds: pytest.fail("timed again"))
    assert again.reused


def test_what_was_timed_before_an_interruption_is_kept(others):
    others(0.0)
    larger = PLAIN.with_(batch=4)

    def interrupt(line):
        if line.startswith("2 of 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune([(PLAIN, "forward"), (larger, "forward")], measure=rigged(), progress=interrupt)
    tuned.forget()
    assert tuned.milliseconds(larger, "forward")
    assert not tuned.milliseconds(PLAIN, "forward")
