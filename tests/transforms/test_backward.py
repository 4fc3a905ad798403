"""What the autograd engine asks of a node: the gradients that are wanted, its errors, hooks, results changed later."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import detect_anomaly, forward_ad
from torch.autograd.graph import (
    GradientEdge,
    allow_mutation_on_saved_tensors,
    disable_saved_tensors_hooks,
    get_gradient_edge,
    register_multi_grad_hook,
    save_on_cpu,
)

import pyvolconv

from ..closeness import assert_close
from .cases import PAIRS, Called, assert_same, operands

GRADIENTS = {
    "conv3d": ("conv3d_grad_input", "conv3d_grad_weight"),
    "conv_transpose3d": ("conv3d", "conv3d_grad_weight"),
    "conv3d_activation": ("conv3d_grad_input", "conv3d_grad_weight"),
    "conv3d_max_pool": ("conv3d_max_pool_grad_input", "conv3d_max_pool_grad_weight"),
}


@pytest.mark.parametrize("through", ["leaves", "results"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_computes_the_gradients_that_are_asked_for(name, through):
    """As torch's own node: `autograd.grad(y, w)` does not compute that of x, which requires one too."""
    leaves = operands()
    args = leaves if through == "leaves" else [leaf * 1 for leaf in leaves]
    y = getattr(pyvolconv, name)(*args).sum()
    whole = torch.autograd.grad(y, leaves, retain_graph=True)
    for wanted in itertools.chain([(2,)], itertools.combinations(range(3), 2), [(0,), (1,)]):
        asked = [leaves[index] for index in wanted]
        with Called() as called:
            got = torch.autograd.grad(y, asked, retain_graph=True)
        assert_close(got, tuple(whole[index] for index in wanted))
        expected = {GRADIENTS[name][index] for index in wanted if index < 2}
        assert set(called.times) == expected
        with Called() as called:
            y.backward(inputs=asked, retain_graph=True)
        assert set(called.times) == expected
        for leaf in leaves:
            leaf.grad = None


def test_second_derivatives_compute_what_is_asked_for():
    """A gradient penalty: the derivative of the gradient of x with respect to the weight alone."""
    x, w, _ = operands()
    (gradient,) = torch.autograd.grad(pyvolconv.conv3d(x, w).pow(2).sum(), x, create_graph=True)
    with Called() as called:
        torch.autograd.grad(gradient.pow(2).sum(), w)
    with Called() as both:
        (gradient,) = torch.autograd.grad(pyvolconv.conv3d(x, w).pow(2).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.pow(2).sum(), (x, w))
    assert sum(called.times.values()) < sum(both.times.values()) - 2


def backward_twice(function):
    y = function(*operands()).sum()
    y.backward()
    y.backward()


def backward_twice_retained(function):
    args = operands()
    y = function(*args).pow(2).sum()
    y.backward(retain_graph=True)
    y.backward()
    return [arg.grad for arg in args]


def unused(function):
    args = operands()
    return torch.autograd.grad(function(*args).sum(), [torch.ones(3, requires_grad=True), *args])


def unused_allowed(function):
    args = operands()
    (*got,) = torch.autograd.grad(function(*args).sum(), [torch.ones(3, requires_grad=True), *args], allow_unused=True)
    return [torch.zeros(0) if gradient is None else gradient for gradient in got]


def unused_materialized(function):
    args = operands()
    several = [torch.ones(3, requires_grad=True), *args]
    return torch.autograd.grad(function(*args).sum(), several, materialize_grads=True)


def into_results(function):
    """Gradients of tensors that are no leaves, and of leaves through them."""
    args = operands()
    doubled = [arg * 2 for arg in args]
    for tensor in doubled:
        tensor.retain_grad()
    function(*doubled).pow(2).sum().backward()
    return [tensor.grad for tensor in (*args, *doubled)]


def shared_operand(function):
    """One tensor as input and weight."""
    x = operands()[0][:, :, :3, :2, :3].repeat(2, 1, 1, 1, 1).detach().requires_grad_()
    y = torch.cat([function(x, x, padding=2), function(x, x, padding=2)])
    return torch.autograd.grad(y.pow(2).sum(), x)


def changed(which):
    def check(function):
        args = [leaf * 1 for leaf in operands()]
        y = function(*args)
        args[which].add_(1)
        y.sum().backward()

    return check


def frozen_weight_changed(function):
    x, w, _ = operands()
    w = w.detach()
    y = function(x, w)
    w.add_(1)
    y.sum().backward()


def weight_changed_by_an_optimizer(function):
    x, w, b = operands()
    y = function(x, w, b).sum()
    y.backward(retain_graph=True)
    torch.optim.SGD([w, b], 0.1).step()
    y.backward()


def inference_tensor_saved(function):
    _, w, _ = operands()
    with torch.inference_mode():
        x = operands()[0]
    function(x, w)


def inference_result_used(function):
    x, w, _ = operands()
    with torch.inference_mode():
        y = function(x, w)
    assert y.is_inference()
    return (y * w.sum()).sum()


def saved_on_cpu(function):
    args = operands()
    with save_on_cpu():
        y = function(*args)
    return torch.autograd.grad(y.pow(2).sum(), args)


def saved_and_changed(function):
    leaves = operands()
    with allow_mutation_on_saved_tensors():
        args = [leaf * 1 for leaf in leaves]
        y = function(*args)
        for tensor in (*args, y):
            tensor.zero_()
        return torch.autograd.grad(y.sum() + function(*args).sum(), leaves, allow_unused=True)[0]


def hooks_disabled(function):
    args = operands()
    with disable_saved_tensors_hooks("not now"):
        return torch.autograd.grad(function(*args).sum(), args)


def hooked_tensors(function):
    """Hooks that change gradients, of leaves, of a result and of a node, and hooks that are told of them."""
    args, accumulated, together = operands(), {}, []
    for number, arg in enumerate(args):
        arg.register_hook(lambda gradient: gradient * 2)
        arg.register_post_accumulate_grad_hook(
            lambda arg, number=number: accumulated.setdefault(number, []).append(arg.grad.clone())
        )
    y = function(*args)
    y.register_hook(lambda gradient: gradient + 1)
    y.grad_fn.register_prehook(lambda gradients: (gradients[0] * 3, *gradients[1:]))
    register_multi_grad_hook(args, together.extend)
    y.pow(2).sum().backward()
    return accumulated, together, [arg.grad for arg in args]


def gradient_edges(function):
    args = [leaf * 1 for leaf in operands()]
    edges = [get_gradient_edge(arg) for arg in args]
    assert all(isinstance(edge, GradientEdge) for edge in edges)
    return torch.autograd.grad(function(*args).pow(2).sum(), edges)


def tangents_without_gradients(function):
    args, level = operands(requires_grad=False), []
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(arg, arg + 1) for arg in args]
            level.append(forward_ad.unpack_dual(function(*duals)).tangent)
    return level


CHECKS = (
    *(backward_twice, backward_twice_retained, unused, unused_allowed, unused_materialized, into_results),
    *(shared_operand, changed(0), changed(1), changed(2), frozen_weight_changed, weight_changed_by_an_optimizer),
    *(inference_tensor_saved, inference_result_used, saved_on_cpu, saved_and_changed, hooks_disabled),
    *(hooked_tensors, gradient_edges, tangents_without_gradients),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=f"{n}-{check.__name__}") for n, check in enumerate(CHECKS)])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_as_torchs_own_node(check, ours, theirs):
    assert_same(check, ours, theirs)


@pytest.mark.parametrize("change", ["add_", "zero_"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_results_may_be_changed_in_place(ours, theirs, change):
    """No node keeps its own result, so nobody minds."""

    def check(function):
        args = operands()
        y = function(*args)
        y = y.add_(1) if change == "add_" else y.mul_(2).add_(y)
        return torch.autograd.grad(y.pow(2).sum(), args)

    assert_same(check, ours, theirs)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_anomaly_mode_names_the_call(ours, theirs):
    def backward_of_nan(function):
        y = function(*operands())
        y.backward(torch.full_like(y, float("nan")))

    for function in (ours, theirs):
        with (
            detect_anomaly(),
            pytest.raises(RuntimeError, match=r"Function '\w+' returned nan values in its 0th output"),
        ):
            backward_of_nan(function)
        with detect_anomaly():
            args = operands()
            function(*args).sum().backward()
            assert args[0].grad.isfinite().all()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_compiled_autograd_takes_the_node(ours, theirs):
    args = operands()
    y = ours(*args).pow(2).sum()
    expected = torch.autograd.grad(y, args, retain_graph=True)
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        got = torch.autograd.grad(y, args)
    torch.compiler.reset()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_are_all_there_are(ours, theirs):
    args = operands(torch.float32)
    results = []
    for _ in range(3):
        y = ours(*args)
        gradients = torch.autograd.grad(y.pow(2).sum(), args, create_graph=True)
        results.append((y, *gradients, *torch.autograd.grad(gradients[0].pow(2).sum(), args[1])))
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)
    torch.testing.assert_close(results[0][0], theirs(*args), rtol=1e-4, atol=1e-4)
