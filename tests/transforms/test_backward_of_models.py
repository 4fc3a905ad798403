"""Checkpoints, saved tensors, hooks, in-place changes and modes around accelerated models, fused chains among them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import pyvolconv

from ..closeness import assert_close
from .cases import Called, assert_same, outcome, sample


def backward(model, y, *leaves):
    """Gradients of parameters and leaves, by `backward()`, which reentrant checkpoints need."""
    model.zero_grad()
    y.pow(2).sum().backward()
    return [leaf.grad for leaf in (*leaves, *model.parameters())]


def leaf():
    return sample().requires_grad_()


def plain(model, **options):
    x = leaf()
    return backward(model, checkpoint(model, x, **options), x)


def in_segments(model, **options):
    x = leaf()
    return backward(model, checkpoint_sequential(model, 2, x, **options), x)


def nested(model):
    x = leaf()
    inner = partial(checkpoint, model, use_reentrant=False)
    return backward(model, checkpoint(lambda x: inner(x * 2) + inner(x), x, use_reentrant=False), x)


def selective(model, policy):
    x = leaf()
    context = partial(create_selective_checkpoint_contexts, lambda _, operator, *args, **kwargs: policy(operator))
    return backward(model, checkpoint(model, x, use_reentrant=False, context_fn=context), x)


def save_all(operator):
    return CheckpointPolicy.MUST_SAVE


def save_convolutions(operator):
    names = ("conv3d", "conv3d_grad_input", "conv3d_max_pool", "convolution")
    found = operator.overloadpacket.__name__ in names
    return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE


def gradient_inside(model):
    """A gradient penalty computed inside of the checkpoint."""

    def penalty(x):
        y = model(x).pow(3).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return gradient + y

    x = leaf()
    return backward(model, checkpoint(penalty, x, use_reentrant=False), x)


def gradient_around(model):
    x = leaf()
    y = checkpoint(model, x, use_reentrant=False).pow(3).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    return backward(model, gradient, x)


def on_cpu(model):
    x = leaf()
    with save_on_cpu():
        y = model(x)
    return backward(model, y, x)


def packed(model):
    """What is saved goes through the hooks and comes back as what they make of it."""
    x = leaf()
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        y = model(x)
    return backward(model, y, x)


def mutated(model):
    x = leaf()
    with allow_mutation_on_saved_tensors():
        doubled = x * 2
        y = model(doubled)
        doubled.zero_()
        return backward(model, y * 1, x)


def anomaly(model):
    x = leaf()
    with torch.autograd.detect_anomaly():
        return backward(model, model(x), x)


def retained(model):
    x = leaf()
    y = model(x)
    y.pow(2).sum().backward(retain_graph=True)
    return backward(model, y, x)


def hooked_parameters(model):
    accumulated, handles = {}, []
    for name, parameter in model.named_parameters():
        handles.append(parameter.register_hook(lambda gradient: gradient * 2))
        handles.append(
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: accumulated.setdefault(name, []).append(parameter.grad.clone())
            )
        )
    x = leaf()
    gradients = backward(model, model(x), x)
    for handle in handles:
        handle.remove()
    return accumulated, gradients


def hooked_modules(model, which=slice(None)):
    """Each hook is called as often, and with the same values, as on torch's modules."""
    seen, handles = [], []

    def keep(kind, *tensors):
        seen.append((kind, *(tensor.detach().clone() for tensor in tensors if tensor is not None)))

    for number, module in list(enumerate(model.modules()))[which]:
        handles += [
            module.register_forward_pre_hook(lambda _, args, n=number: keep(n, *args)),
            module.register_forward_hook(lambda _, args, y, n=number: keep(n, *args, y)),
            module.register_full_backward_pre_hook(lambda _, grads, n=number: keep(n, *grads)),
            module.register_full_backward_hook(lambda _, inner, outer, n=number: keep(n, *inner, *outer)),
        ]
    x = leaf()
    gradients = backward(model, model(x), x)
    for handle in handles:
        handle.remove()
    return seen, gradients


def function_mode(model):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x = leaf()
    with Mode(), torch.device("cpu"):
        return backward(model, model(x), x)


def dispatch_mode(model):
    x = leaf()
    with Called():
        return backward(model, model(x), x)


def wrapper_subclass(model):
    """A subclass with `__torch_dispatch__` that is not told of this package: two tensors that go the same way."""
    x = sample()
    y = model(TwoTensor(x, x * 2))
    return y.a, y.b


CHECKS = {
    "checkpoint": partial(plain, use_reentrant=False),
    "checkpoint, reentrant": partial(plain, use_reentrant=True),
    "checkpoint, not stopped early": lambda model: _not_stopped_early(model),
    "checkpointed segments": partial(in_segments, use_reentrant=False),
    "checkpointed segments, reentrant": partial(in_segments, use_reentrant=True),
    "checkpoint in a checkpoint": nested,
    "checkpoint that saves all": partial(selective, policy=save_all),
    "checkpoint that saves convolutions": partial(selective, policy=save_convolutions),
    "gradient inside of a checkpoint": gradient_inside,
    "gradient around a checkpoint": gradient_around,
    **{f.__name__: f for f in (on_cpu, packed, mutated, anomaly, retained, hooked_parameters, hooked_modules)},
    "hooked root": partial(hooked_modules, which=slice(1)),
    "hooked second module": partial(hooked_modules, which=slice(2, 3)),
    **{f.__name__: f for f in (function_mode, dispatch_mode, wrapper_subclass)},
}


def _not_stopped_early(model):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return plain(model, use_reentrant=False)


@pytest.mark.parametrize("check", CHECKS)
def test_as_torchs_own_modules(check, pair):
    assert_same(CHECKS[check], *pair)


@pytest.mark.parametrize(
    "change", [lambda y: y.add_(1), F.relu_, lambda y: y.mul_(2), partial(F.dropout, inplace=True)]
)
@pytest.mark.parametrize("name", ["leaky_relu", "silu", "relu"])
@pytest.mark.parametrize("pooled", [False, True])
def test_results_of_chains_may_be_changed_where_torchs_may(name, pooled, change):
    """As a residual connection in place: torch allows it behind LeakyReLU, and behind ReLU if it is pooled."""
    activation = {"leaky_relu": nn.LeakyReLU(0.2), "silu": nn.SiLU(), "relu": nn.ReLU()}[name]
    theirs = nn.Sequential(nn.Conv3d(2, 4, 3), activation, *([nn.MaxPool3d(2)] if pooled else [])).double()
    ours = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(2, 4, 3), *theirs[1:]).double())
    ours.load_state_dict(theirs.state_dict())

    def check(model):
        x = leaf()
        return backward(model, change(model(x)), x)

    (got, error), (expected, expected_error) = outcome(check, ours), outcome(check, theirs)
    assert type(error) is type(expected_error)
    assert (error is not None) == (name == "relu" and not pooled)
    if error is None:
        assert_close(got, expected)
    else:
        assert "modified by an inplace operation" in str(error)


@pytest.mark.parametrize("inplace", [False, True])
def test_leaky_relu_overwrites_where_it_is_told_to_or_nobody_minds(inplace):
    """One tensor less where no gradient needs it, as `fusion_report` says."""
    model = pyvolconv.accelerate(nn.Sequential(nn.Conv3d(2, 4, 3), nn.LeakyReLU(0.2, inplace)))
    (row,) = pyvolconv.fusion_report(model).rows
    assert row.became == "Conv3d + LeakyReLU, in place" + ("" if inplace else " without gradients")
    y = model(torch.randn(1, 2, 4, 4, 4))
    assert (y._version == 1) == inplace
    with torch.no_grad():
        assert model(torch.randn(1, 2, 4, 4, 4))._version == 1


def test_same_bits_in_every_grad_mode(pair):
    model, _ = pair
    x = sample()
    expected = model(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x), expected)


def test_deterministic_algorithms_are_all_there_are(pair):
    model, _ = pair
    x = sample()
    torch.use_deterministic_algorithms(True)
    try:
        several = [torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters())) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*both) for other in several[1:] for both in zip(several[0], other, strict=True))
