"""The error says which pass of which problem failed in which backend, wherever the pass was asked for."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import pyvolconv
from pyvolconv import fused_ops
from pyvolconv.errors import BackendError, BackendMemoryError, UnsupportedProblemError, failure
from pyvolconv.problem import ConvProblem

from .planted import BROKEN, PlantedError

PROBLEM = ConvProblem.parse(f"cpu-float32-ncdhw-n2ic3oc{BROKEN}-i5x5x5-k3-p1-bias")


def operands(requires_grad=True):
    x, w = torch.randn(PROBLEM.input_shape), torch.randn(PROBLEM.weight_shape)
    return [one.requires_grad_(requires_grad) for one in (x, w, torch.randn(BROKEN))]


def strided(x, w, b):
    """Not dense, which takes the way through torch's dispatcher."""
    return pyvolconv.conv3d(x.transpose(2, 3), w, b, padding=1)


def pooled(x, w, b, **options):
    return pyvolconv.conv3d_max_pool(x, w, b, padding=1, activation="relu", **options)


def compiled(x, w, b):
    return torch.compile(lambda *args: pyvolconv.conv3d(*args, padding=1), backend="aot_eager", fullgraph=True)(x, w, b)


WAYS = {
    "short": lambda x, w, b: pyvolconv.conv3d(x, w, b, padding=1),
    "long": strided,
    "unbatched": lambda x, w, b: pyvolconv.conv3d(x[0], w, b, padding=1),
    "module": lambda x, w, b: torch.func.functional_call(
        pyvolconv.Conv3d(3, BROKEN, 3, padding=1), {"weight": w, "bias": b}, x
    ),
    "pooled": pooled,
    "pooled, long": lambda x, w, b: pooled(x.transpose(2, 3), w, b),
    "vmap": lambda x, w, b: torch.vmap(lambda one: pyvolconv.conv3d(one, w, b, padding=1))(x[None]),
    "compiled": compiled,
    "patched": pyvolconv.patch()(lambda x, w, b: torch.nn.functional.conv3d(x, w, b, padding=1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_problem_pass_and_backend(way, pass_, planted):
    fault = PlantedError("in the middle")
    planted.break_(pass_, fault)
    with pytest.raises(BackendError) as caught:
        WAYS[way](*operands()).sum().backward()
    error = caught.value
    assert (error.backend, error.pass_) == ("planted", pass_)
    assert error.problem.weight_shape == PROBLEM.weight_shape
    assert (error.problem.pool is not None) == way.startswith("pooled")
    assert error.__cause__ is fault
    first, last = str(error).splitlines()
    assert first == f"{pass_} of {error.problem}: backend 'planted' failed with PlantedError: in the middle"
    assert last == f"Others that can run it, to be named by use_backend or PYVOLCONV_BACKEND: {', '.join(error.able)}"
    assert "cpp.direct" in error.able
    assert "planted" not in error.able
    if way == "short" and pass_ == "forward":
        assert error.problem == PROBLEM


@pytest.mark.parametrize(("broken", "way"), [("grad_input", "forward"), ("forward", "backward")])
def test_transposed_convolutions_name_the_pass_that_they_are(broken, way, planted):
    layer = pyvolconv.ConvTranspose3d(BROKEN, 2, 2)
    x = torch.randn(1, BROKEN, 3, 3, 3, requires_grad=True)
    y = layer(x)
    planted.break_(broken)
    with pytest.raises(BackendError, match=f"^{broken} of cpu-float32"):
        layer(x) if way == "forward" else y.sum().backward()


def test_inference_of_a_pooled_chain(planted):
    planted.break_("forward")
    with torch.no_grad(), pytest.raises(BackendError, match=r"^forward of .*pool.* 'planted' failed with PlantedError"):
        pooled(*operands(requires_grad=False))


def test_what_asks_to_stop_passes_as_it_is(planted):
    for error in (KeyboardInterrupt(), SystemExit(3)):
        planted.break_("forward", error)
        with pytest.raises(type(error)) as caught:
            pyvolconv.conv3d(*operands(), padding=1)
        assert caught.value is error


@pytest.mark.parametrize("error", [MemoryError("std::bad_alloc"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_lack_of_memory_is_caught_by_whoever_catches_torchs(error, planted):
    planted.break_("forward", error)
    for kind in (RuntimeError, MemoryError, torch.OutOfMemoryError, BackendError):
        with pytest.raises(kind) as caught:
            pyvolconv.conv3d(*operands(), padding=1)
        assert type(caught.value) is BackendMemoryError
    (message,) = caught.value.args
    # By these words, in a RuntimeError with one argument, programs that look for the largest batch know it.
    words = "CUDA out of memory." if isinstance(error, RuntimeError) else "DefaultCPUAllocator: can't allocate memory"
    assert words in message


def test_words_of_torch_for_its_own_memory_are_kept(planted):
    with pytest.raises(RuntimeError) as theirs:
        torch.empty(1 << 60, dtype=torch.uint8)
    planted.break_("forward", theirs.value)
    with pytest.raises(BackendError) as ours:
        pyvolconv.conv3d(*operands(), padding=1)
    assert str(theirs.value) in str(ours.value)


def errors():
    return [
        failure(PROBLEM, "forward", "cpp.direct", ValueError("some"), ["numba"]),
        failure(PROBLEM, "grad_input", "cpp.direct", MemoryError(), []),
        UnsupportedProblemError(PROBLEM, "forward", {"triton": ["no"]}, None, ["aten"]),
    ]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(protocol):
    """As from a worker of a process pool, which hangs or breaks where an exception cannot be made anew."""
    for error in errors():
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is type(error)
        assert (str(copy), vars(copy), copy.args) == (str(error), vars(error), error.args)


def test_what_torch_raises_stays_what_it_is():
    x, w = torch.zeros(1, 2, 5, 5, 5, dtype=torch.uint8), torch.zeros(2, 2, 3, 3, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError) as theirs:
        nn.functional.conv_transpose3d(x, w)
    with pytest.raises(RuntimeError) as ours:
        pyvolconv.conv_transpose3d(x, w)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
    if hasattr(ours.value, "add_note"):
        (note,) = ours.value.__notes__
        assert note.startswith("grad_input of cpu-uint8-ncdhw-")
        assert note.endswith(": backend 'aten'")


def test_operators_put_together_from_plain_passes(planted, monkeypatch):
    monkeypatch.setattr(fused_ops, "choose_fused_or_none", lambda problem, keeps_choices: None)
    planted.break_("forward")
    with pytest.raises(BackendError) as caught:
        pooled(*(one.transpose(2, 3) if one.dim() == 5 else one for one in operands()))
    assert caught.value.problem.pool is None


def test_wrong_arguments_are_still_told_in_words_of_torch(planted):
    planted.break_("forward")
    with pytest.raises(RuntimeError, match="to have 3 channels") as caught:
        nn.functional.conv3d(torch.zeros(1, 2, 5, 5, 5), torch.zeros(PROBLEM.weight_shape))
    with pytest.raises(RuntimeError) as ours:
        pyvolconv.conv3d(torch.zeros(1, 2, 5, 5, 5), torch.zeros(PROBLEM.weight_shape))
    assert (type(ours.value), str(ours.value)) == (type(caught.value), str(caught.value))
