"""A pass that fails in the middle of a training step leaves what a failing layer of torch's leaves."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import pytest
import torch

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.errors import BackendError

from ..closeness import assert_close
from .planted import MODELS, PlantedError, broken_layer, built, example, gradients, snapshot, step


@pytest.fixture(params=["forced", "chosen"])
def context(request):
    return (lambda: pyvolconv.use_backend("planted")) if request.param == "forced" else nullcontext


def fail_in_torch(model, pass_):
    """Have torch's layer fail at the same place, and take one step."""
    layer = broken_layer(model)

    def fail(*_):
        raise PlantedError("in torch")

    handle = (layer.register_forward_hook if pass_ == "forward" else layer.register_full_backward_pre_hook)(fail)
    with pytest.raises(PlantedError, match="in torch"):
        step(model, x=example_of(model))
    handle.remove()


def example_of(model):
    return torch.linspace(-1, 1, 2 * 6**3).sin().view(2, 1, 6, 6, 6)


def thread_state():
    return (
        dispatch.forced_backend(),
        list(dispatch._listeners),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_fails_leaves_what_torch_leaves(name, pass_, context, planted):
    theirs = built(name)
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    for parameter, same in zip(theirs.parameters(), ours.parameters(), strict=True):
        same.grad = parameter.grad.clone()
    before, earlier = snapshot(ours), gradients(ours)
    assert None not in earlier.values()
    fail_in_torch(theirs, pass_)

    planted.break_(pass_)
    with context():
        state = thread_state()
        with pytest.raises(BackendError, match=f"^{pass_} of .*'planted' failed with PlantedError: in the middle"):
            step(ours, example_of(ours))
        assert thread_state() == state
    after = snapshot(ours)
    for what in ("classes", "training", "hooks", "parameters"):
        assert after[what] == before[what], what
    # Layers behind the one that failed have their gradients added, and it and those before it have not: no less, no
    # more, and nothing half.
    touched = {name for name, values in after["gradients"].items() if values != earlier[name]}
    assert touched == {name for name, values in gradients(theirs).items() if values != earlier[name]}
    assert (touched == set()) == (pass_ == "forward")
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_close(mine, other)

    planted.mend()
    for model in (theirs, ours):
        model.zero_grad()
        with context() if model is ours else nullcontext():
            step(model, example_of(model))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("name", MODELS)
def test_a_backward_pass_that_failed_can_be_run_again(name, gradient, planted):
    model = pyvolconv.accelerate(built(name))
    loss = model(example()).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    planted.break_(gradient)
    with pytest.raises(BackendError, match=f"^{gradient} of"):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    planted.mend()
    for got, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_failure_in_one_thread_is_not_felt_in_another(pass_, planted):
    model = pyvolconv.accelerate(built("plain").eval())
    caught = []

    def fail():
        try:
            with pyvolconv.use_backend("planted"):
                step(model, example())
        except BackendError as error:
            caught.append(error)
        caught.append(dispatch.forced_backend())

    planted.break_(pass_)
    thread = threading.Thread(target=fail)
    with pyvolconv.use_backend("numba"):
        thread.start()
        thread.join()
        assert dispatch.forced_backend() == "numba"
        step(model, example())
    assert isinstance(caught[0], BackendError)
    assert caught[1] is None
