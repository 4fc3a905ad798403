"""Every backend of the registry, every problem, every pass: correct, exact where it says so, and well behaved."""

from __future__ import annotations

import pytest
import torch

import pyvolconv
from pyvolconv.backends import aten, base
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.errors import UnsupportedProblemError
from pyvolconv.problem import PASSES, ConvProblem

from .closeness import assert_close
from .error_bound import largest_constant

SENTINEL = 12345.0
ON_EVERY_CPU = ("cpp.direct", "im2col", "numba", "aten")


@pytest.fixture
def guarded_results(monkeypatch):
    """Results of backends lie between guards, hold NaN at first, and a write outside of them fails the test."""
    buffers = []
    torch_empty = torch.empty

    def empty(*size, **options):
        plain = torch_empty(*size, **options)
        if not plain.is_floating_point():
            return plain
        buffer = plain.new_full((plain.numel() + 134,), SENTINEL)
        buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), 67).fill_(float("nan"))

    monkeypatch.setattr(base.torch, "empty", empty)
    yield
    monkeypatch.undo()
    for buffer in buffers:
        assert bool((buffer[:67] == SENTINEL).all()), "wrote before the result"
        assert bool((buffer[-67:] == SENTINEL).all()), "wrote after the result"


def test_able_backends_say_so(float32_problem, pass_):
    """What has to run on any CPU must not be skipped by the tests below."""
    for problem in (float32_problem, float32_problem.with_(dtype="float64")):
        able = [b.name for b in pyvolconv.backends() if not b.unsupported_reasons(problem, pass_)]
        corrupted = problem.dtype == "float32" and aten.is_corrupted(problem)
        assert set(able) >= set(ON_EVERY_CPU) - ({"aten"} if corrupted else set())


def test_within_bound(backend, problem, pass_, operands, run_pass, assert_within_bound, guarded_results, poisoned):
    args = operands(problem, pass_)
    copies = [arg.clone() for arg in args]
    got = run_pass(backend, problem, pass_, args)

    accuracy = backend.accuracy(problem, pass_)
    most = largest_constant(problem, pass_)
    assert accuracy.constant <= most, "test_reference proves that the bound sees a missing product up to this constant"
    assert_within_bound(got, problem, pass_, args, accuracy)
    assert (
        got.shape
        == {
            "forward": problem.output_shape,
            "grad_input": problem.input_shape,
            "grad_weight": problem.weight_shape,
        }[pass_]
    )
    assert got.dtype == args[0].dtype
    assert got.is_contiguous(memory_format=MEMORY_FORMAT[problem.layout])
    assert not got.requires_grad
    for arg, copy in zip(args, copies, strict=True):
        assert torch.equal(arg, copy), "a pass wrote to its argument"


def test_exact_on_integers(backend, float32_problem, pass_, operands, run_pass, reference, poisoned):
    """Sums of small integers round nowhere, in any order: a plain sum must give them to the bit."""
    accuracy = backend.accuracy(float32_problem, pass_)
    assert accuracy.accumulate_dtype == "float32"
    if not accuracy.exact_integers:
        pytest.skip(f"{backend.name} does not promise exact integers")
    args = operands(float32_problem, pass_, integers=True)
    got = run_pass(backend, float32_problem, pass_, args)
    assert torch.equal(got.cpu().double(), reference(float32_problem, pass_, args))


def test_same_bits_for_every_run_and_thread_count(backend, float32_problem, pass_, operands, run_pass, threads):
    if not backend.accuracy(float32_problem, pass_).bitwise_reproducible:
        pytest.skip(f"{backend.name} does not promise the same bits")
    args = operands(float32_problem, pass_)
    threads(1)
    first = run_pass(backend, float32_problem, pass_, args)
    # Torch's threads are not those of a GPU, and the interpreter has one.
    for count in (2,) if backend.family == "triton" else (1, 2, 3):
        threads(count)
        again = run_pass(backend, float32_problem, pass_, args)
        assert torch.equal(again, first), f"other bits with {count} threads"


def test_hand_written_cpu_paths_promise_the_same_bits(pass_):
    problem = ConvProblem.parse("cpu-float32-ndhwc-n2ic16oc24-i5x6x7-k3-p1")
    promised = {b.name for b in pyvolconv.backends() if b.accuracy(problem, pass_).bitwise_reproducible}
    assert {"cpp.direct", "numba"} <= promised


@pytest.mark.parametrize("layout", MEMORY_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_reaches_the_backend(backend, layout, dtype, require):
    """Through the public function: results and gradients, unbatched and empty batch included."""
    problem = ConvProblem.parse(f"cpu-{str(dtype)[6:]}-{layout}-n2ic4oc6-i5x4x6-k3-s2x1x1-p1-bias")
    for pass_ in PASSES:
        require(backend, problem, pass_)
    w = torch.randn(problem.weight_shape, dtype=dtype).requires_grad_()
    b = torch.randn(6, dtype=dtype).requires_grad_()
    for shape in (problem.input_shape, problem.input_shape[1:], (0, *problem.input_shape[1:])):
        x = torch.randn(shape, dtype=dtype)
        if x.dim() == 5:
            x = x.contiguous(memory_format=MEMORY_FORMAT[layout])
        x.requires_grad_()
        with pyvolconv.use_backend(backend.name):
            y = pyvolconv.conv3d(x, w, b, (2, 1, 1), 1)
        expected = torch.nn.functional.conv3d(x, w, b, (2, 1, 1), 1)
        grad = torch.randn(y.shape, dtype=dtype)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y, (x, w, b), grad), torch.autograd.grad(expected, (x, w, b), grad))


def test_forced_backend_does_not_fall_back(backend):
    if not backend.ours:
        pytest.skip("torch computes every problem")
    x, w = torch.randn(1, 2, 4, 4, 4, dtype=torch.complex64), torch.randn(3, 2, 3, 3, 3, dtype=torch.complex64)
    with pyvolconv.use_backend(backend.name), pytest.raises(UnsupportedProblemError) as raised:
        pyvolconv.conv3d(x, w)
    assert all(raised.value.reasons.values())
    assert list(raised.value.reasons) == [backend.name]
    assert all(reason in str(raised.value) for reason in raised.value.reasons[backend.name])
