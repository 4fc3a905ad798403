"""Who computes: forced by block or environment, else by the cost model; refused with every reason."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
import torch.nn.functional as F

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.backends import registry as registry_module
from pyvolconv.backends.base import Accuracy, Backend
from pyvolconv.backends.registry import REGISTRY, select
from pyvolconv.errors import UnsupportedProblemError
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

PROBLEM = ConvProblem.parse("cpu-float32-ncdhw-n2ic16oc16-i4x5x6-k3-p1")


class Recorder(Backend):
    """Hands every pass on to ATen and notes it; also plays a backend of any efficiency that refuses some passes."""

    family = "recorder"

    def __init__(self, name="recorder", efficiency=0.5, refuses=(), automatic=True, ours=True):
        self.name, self.efficiency, self.refuses = name, efficiency, refuses
        self.automatic, self.ours = automatic, ours
        self.calls = []

    def unsupported_reasons(self, problem, pass_):
        return ["first reason", "second reason"] if pass_ in self.refuses else []

    def expected_efficiency(self, problem, pass_):
        return self.efficiency

    def accuracy(self, problem, pass_):
        return Accuracy(1.0, problem.dtype, True)

    def forward(self, problem, *args):
        self.calls.append("forward")
        return REGISTRY[-1].forward(problem, *args)

    def grad_input(self, problem, *args):
        self.calls.append("grad_input")
        return REGISTRY[-1].grad_input(problem, *args)

    def grad_weight(self, problem, *args):
        self.calls.append("grad_weight")
        return REGISTRY[-1].grad_weight(problem, *args)


@pytest.fixture
def registry(monkeypatch):
    """registry(*backends): those are all there are, for the dispatcher and for `use_backend`."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)

    def install(*backends):
        monkeypatch.setattr(dispatch, "REGISTRY", backends)
        monkeypatch.setattr(registry_module, "REGISTRY", backends)

    return install


def convolve(requires_grad=False):
    x = torch.randn(PROBLEM.input_shape, requires_grad=requires_grad)
    w = torch.randn(PROBLEM.weight_shape, requires_grad=requires_grad)
    return pyvolconv.conv3d(x, w, padding=1)


def test_registry_is_what_the_package_shows():
    assert pyvolconv.backends() is REGISTRY
    names = [backend.name for backend in REGISTRY]
    assert len(set(names)) == len(names)
    assert names[-1] == "aten"
    assert [backend.name for backend in REGISTRY if not backend.ours] == ["aten"]
    assert all(backend.name.split(".")[0] == backend.family for backend in REGISTRY)


def test_select_takes_names_and_families():
    for backend in REGISTRY:
        assert select(backend.name) == (backend,)
        assert backend in select(backend.family)


@pytest.mark.parametrize("name", ["", "cuda", "cpp.", "CPP", "aten "])
def test_unknown_name_lists_those_that_exist(name):
    with pytest.raises(ValueError, match="unknown backend") as raised, pyvolconv.use_backend(name):
        pass
    assert repr(name) in str(raised.value)
    assert all(backend.name in str(raised.value) and backend.family in str(raised.value) for backend in REGISTRY)


def test_forced_by_name_and_by_family(backend):
    for forced in (backend.name, backend.family):
        with pyvolconv.use_backend(forced):
            assert dispatch.forced_backend() == forced
            for pass_ in PASSES:
                if not backend.unsupported_reasons(PROBLEM, pass_):
                    chosen = dispatch.choose(PROBLEM, pass_)
                    assert chosen is backend or (forced == backend.family == chosen.family != backend.name)
        assert dispatch.forced_backend() is None


def test_family_takes_its_best_able_member(registry):
    fast = Recorder("recorder.fast", 0.9, refuses=("grad_weight",))
    slow = Recorder("recorder.slow", 0.1)
    registry(slow, fast, REGISTRY[-1])
    with pyvolconv.use_backend("recorder"):
        convolve(requires_grad=True).sum().backward()
    assert sorted(fast.calls) == ["forward", "grad_input"]
    assert slow.calls == ["grad_weight"]


def test_forced_by_environment(registry, monkeypatch):
    one, other = Recorder("one"), Recorder("other", 0.9)
    registry(one, other)
    monkeypatch.setenv("PYVOLCONV_BACKEND", "one")
    convolve()
    assert (one.calls, other.calls) == (["forward"], [])
    with pyvolconv.use_backend("other"):
        convolve()
    assert (one.calls, other.calls) == (["forward"], ["forward"])
    monkeypatch.setenv("PYVOLCONV_BACKEND", "")
    convolve()
    assert other.calls == ["forward", "forward"]


def test_wrong_name_in_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("PYVOLCONV_BACKEND", "cuda")
    for _ in range(2):
        with pytest.raises(ValueError, match="PYVOLCONV_BACKEND=cuda: unknown backend 'cuda'; expected one of: "):
            convolve()


def test_innermost_block_wins_and_is_undone_by_an_exception():
    with pyvolconv.use_backend("numba"):
        with pyvolconv.use_backend("aten"):
            assert dispatch.forced_backend() == "aten"
        assert dispatch.forced_backend() == "numba"
        with pytest.raises(KeyError), pyvolconv.use_backend("aten"):
            raise KeyError
        assert dispatch.forced_backend() == "numba"
    assert dispatch.forced_backend() is None


def test_as_a_decorator():
    @pyvolconv.use_backend("numba")
    def forced():
        return dispatch.forced_backend()

    assert (forced(), forced(), dispatch.forced_backend()) == ("numba", "numba", None)


def test_block_is_of_one_thread_only():
    seen = []
    with pyvolconv.use_backend("numba"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
        assert dispatch.forced_backend() == "numba"
    assert seen == [None]


def test_gradient_keeps_the_backend_of_its_forward_call(registry):
    one, other = Recorder("one", 0.1), Recorder("other", 0.9)
    registry(one, other)
    with pyvolconv.use_backend("one"):
        y = convolve(requires_grad=True)
    y.sum().backward()
    assert (sorted(one.calls), other.calls) == (sorted(PASSES), [])
    assert dispatch.forced_backend() is None


def test_gradient_in_another_thread_keeps_it_too(registry):
    one, other = Recorder("one", 0.1), Recorder("other", 0.9)
    registry(one, other)
    with pyvolconv.use_backend("one"):
        y = convolve(requires_grad=True)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert (sorted(one.calls), other.calls) == (sorted(PASSES), [])


def test_only_needed_gradients_are_computed(registry):
    recorder = Recorder()
    registry(recorder)
    x, w = torch.randn(PROBLEM.input_shape), torch.randn(PROBLEM.weight_shape, requires_grad=True)
    pyvolconv.conv3d(x, w, padding=1).sum().backward()
    assert recorder.calls == ["forward", "grad_weight"]
    recorder.calls.clear()
    pyvolconv.conv3d(x.requires_grad_(), w.detach(), padding=1).sum().backward()
    assert recorder.calls == ["forward", "grad_input"]


def test_cost_model_takes_the_largest_expected_share(registry):
    registry(Recorder("slow", 0.2), Recorder("fast", 0.6), Recorder("hidden", 0.9, automatic=False))
    assert dispatch.choose(PROBLEM, "forward").name == "fast"
    dispatch.forget_choices()
    registry(Recorder("slow", 0.2), Recorder("fast", 0.6, refuses=("forward",)))
    assert dispatch.choose(PROBLEM, "forward").name == "slow"
    assert dispatch.choose(PROBLEM, "grad_input").name == "fast"


def test_cost_model_over_the_real_registry(float32_problem, pass_):
    chosen = dispatch.choose(float32_problem, pass_)
    able = [b for b in REGISTRY if b.automatic and not b.unsupported_reasons(float32_problem, pass_)]
    best = max(b.expected_efficiency(float32_problem, pass_) for b in able)
    assert chosen in able
    assert chosen.expected_efficiency(float32_problem, pass_) == best
    assert best > 0
    assert chosen.name != "numba"


def test_refusal_names_problem_pass_and_every_reason(registry):
    registry(Recorder("one", refuses=PASSES), Recorder("other", refuses=PASSES))
    with pytest.raises(UnsupportedProblemError) as raised:
        convolve()
    error = raised.value
    assert isinstance(error, RuntimeError)
    assert (error.problem, error.pass_) == (PROBLEM, "forward")
    assert error.reasons == {name: ["first reason", "second reason"] for name in ("one", "other")}
    message = str(error)
    assert message.startswith(f"forward of {PROBLEM}: no backend was forced")
    assert message.count("first reason") == message.count("second reason") == 2
    with (
        pyvolconv.use_backend("one"),
        pytest.raises(UnsupportedProblemError, match="backend 'one' was forced") as raised,
    ):
        convolve()
    assert list(raised.value.reasons) == ["one"]


def test_refusal_says_what_to_do(registry):
    refusing = Recorder("one", refuses=PASSES)
    registry(refusing, Recorder("two"), Recorder("shy", automatic=False))
    with pyvolconv.use_backend("one"), pytest.raises(UnsupportedProblemError) as raised:
        convolve()
    assert raised.value.able == ("two", "shy")
    *_, last = str(raised.value).splitlines()
    assert last.startswith("Leave the backend unforced, or name one that can")
    assert last.endswith(": two, shy")
    dispatch.forget_choices()
    registry(refusing, Recorder("shy", automatic=False))
    with pytest.raises(UnsupportedProblemError, match=r"\nName one that can, by use_backend.*: shy$"):
        convolve()
    dispatch.forget_choices()
    registry(refusing)
    with pytest.raises(UnsupportedProblemError, match="\nNo other backend can run it here") as raised:
        convolve()
    assert raised.value.able == ()


def test_refused_gradient_is_an_error_and_leaves_nothing_half_written(registry):
    registry(Recorder(refuses=("grad_weight",)))
    x = torch.randn(PROBLEM.input_shape)
    w = torch.randn(PROBLEM.weight_shape, requires_grad=True)
    copy = w.detach().clone()
    with pytest.raises(UnsupportedProblemError, match="grad_weight of cpu-float32"):
        pyvolconv.conv3d(x, w, padding=1).sum().backward()
    assert w.grad is None
    assert torch.equal(w, copy)


def test_falling_to_aten_is_logged_once_per_problem(registry, caplog):
    registry(Recorder("one", refuses=PASSES), Recorder("two", refuses=PASSES), REGISTRY[-1])
    with caplog.at_level(logging.WARNING, logger="pyvolconv"):
        for _ in range(3):
            convolve()
        assert [record.getMessage() for record in caplog.records] == [
            f"forward of {PROBLEM} runs in ATen (one, two: first reason)"
        ]
        caplog.clear()
        with pyvolconv.use_backend("aten"):
            convolve()
        assert caplog.records == []


def test_result_is_that_of_the_forced_backend():
    x, w = torch.randn(PROBLEM.input_shape), torch.randn(PROBLEM.weight_shape)
    with pyvolconv.use_backend("aten"):
        assert torch.equal(pyvolconv.conv3d(x, w, padding=1), F.conv3d(x, w, padding=1))


def test_choices_do_not_pile_up():
    for batch in range(1, 5001):
        dispatch.choose(PROBLEM.with_(batch=batch), "forward")
    assert dispatch._choose.cache_info().currsize < 5000


@pytest.mark.parametrize(
    "text", ["n1ic3oc1-i1x1x1-k1-s2-p1", "n2ic16oc16-i1x1x1-k2-s9-p8-d9", "n1g3ic9oc9-i1x2x1-k1x3x1-s3-p2"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_problem_that_is_all_padding_has_a_backend(text, dtype, layout, pass_, monkeypatch):
    """No output voxel meets an input voxel: there is nothing to divide a cost by."""
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        for backend in REGISTRY:
            if not backend.unsupported_reasons(problem, pass_):
                assert 0 < backend.expected_efficiency(problem, pass_) < 10


def test_a_refusal_is_not_remembered_when_the_environment_changes(monkeypatch):
    pytest.importorskip("triton")
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i4-k3")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pyvolconv.use_backend("triton.implicit_gemm"), pytest.raises(pyvolconv.UnsupportedProblemError):
        dispatch.choose(problem, "forward")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pyvolconv.use_backend("triton.implicit_gemm"):
        assert dispatch.choose(problem, "forward").name == "triton.implicit_gemm"


@pytest.mark.parametrize("text", ["n0ic4oc4-i5-k3", "n1ic4oc4-i0x5x5-k3-p2", "n0ic4oc4-i5-k3-relu-pool2"])
def test_nothing_to_compute_is_anybodys(text):
    problem = ConvProblem.parse(f"cpu-float32-ndhwc-{text}")
    for pass_ in PASSES:
        assert dispatch.choose(problem, pass_).name in {backend.name for backend in pyvolconv.backends()}
    if problem.pool is not None:
        assert dispatch.choose_fused_or_none(problem, keeps_choices=False) is not None
