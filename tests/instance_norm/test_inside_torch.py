"""`InstanceNorm3d` inside of torch: layouts, autocast, transforms, compilers, checkpoints, errors."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from pyvolconv.instance_norm import instance_norm_activation

from ..closeness import assert_close
from .operands import chain, compiled, models, pair

pytestmark = compiled


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_strides_of_channels_last(keep, grad):
    """Torch's results are contiguous, and so are ours where nobody asked for more."""
    theirs, ours = pair(affine=True)
    ours.keeps_channels_last = keep
    x = torch.randn(2, 6, 4, 5, 6).to(memory_format=torch.channels_last_3d).requires_grad_(grad)
    expected, y = theirs(x), ours(x)
    assert_close(y, expected)
    if keep:
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
    else:
        assert y.stride() == expected.stride()


@pytest.mark.parametrize("shape", [(2, 6, 5, 4, 7), (6, 3, 4, 5), (1, 6, 1, 1, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_module_alone(shape, affine, calls):
    """In float64 torch's: of two values that are nearly equal its float32 is off by far more than ours."""
    theirs, ours = pair(affine=affine)
    x = torch.randn(shape)
    expected, y = theirs(x), ours(x)
    assert len(calls) == 1
    assert y.stride() == expected.stride()
    assert_close(y, theirs.double()(x.double()).float())


def untouched():
    yield "running statistics", {"track_running_stats": True}, torch.randn(2, 6, 4, 4, 4)
    yield "half", {}, torch.randn(2, 6, 4, 4, 4).half()
    yield "strided", {}, torch.randn(2, 6, 4, 4, 8)[..., ::2]
    yield "parameters of another dtype", {"affine": True, "dtype": torch.float32}, torch.randn(2, 6, 4, 4, 4).bfloat16()


@pytest.mark.parametrize(("options", "x"), [pytest.param(*case, id=name) for name, *case in untouched()])
@pytest.mark.parametrize("training", [True, False])
def test_the_rest_is_torch_to_the_bit(options, x, training, calls):
    theirs, ours = (module.train(training) for module in pair(**options))
    expected, y = theirs(x), ours(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    for buffer, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(buffer, other)
    assert calls == []


def test_autocast_decides_as_for_torch(calls):
    theirs, ours = pair(affine=True)
    x = torch.randn(1, 6, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    assert calls == []


def test_transforms_and_tracers_are_torch_s(calls):
    theirs, ours = chain("slopes")
    x = torch.randn(2, 6, 3, 3, 3)

    def loss(model):
        return lambda value: model(value).square().sum()

    assert_close(torch.func.grad(loss(ours))(x), torch.func.grad(loss(theirs))(x))
    assert_close(torch.func.vmap(ours)(x[None]), theirs(x)[None])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x).cumsum(2))
        tangents = [forward_ad.unpack_dual(model(dual)).tangent for model in (ours, theirs)]
    assert_close(*tangents)
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert_close(traced(x), theirs(x))
    assert "InstanceNormFunction" not in str(traced.graph)
    exported = torch.export.export(ours, (x,)).module()
    assert_close(exported(x), theirs(x))
    assert calls == []


@pytest.mark.slow
def test_compiled_models_are_torch_s(calls):
    theirs, ours = chain("leaky_relu")
    x = torch.randn(2, 6, 3, 3, 3)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), theirs(x))
    assert calls == []


def test_hessian_vector_products_agree():
    theirs, ours = chain("slopes")
    results = []
    x, vector = torch.randn(1, 6, 3, 3, 3, dtype=torch.float64), torch.randn(1, 6, 3, 3, 3, dtype=torch.float64)
    for model in (theirs.double(), ours.double()):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
        grad.mul(vector).sum().backward()
        results.append([leaf.grad, *(parameter.grad for parameter in model.parameters())])
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    _, ours = chain("leaky_relu")
    x = torch.randn(1, 6, 4, 4, 4)
    grads = []
    for function in (ours, lambda value: checkpoint(ours, value, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_the_profiler_sees_the_node():
    _, ours = chain("leaky_relu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        ours(torch.randn(1, 6, 4, 4, 4, requires_grad=True)).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert "InstanceNormFunctionBackward" in names
    assert "aten::instance_norm" not in names


def test_results_may_be_changed_in_place():
    x = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    y = instance_norm_activation(x, None, None, activation="relu")
    y.mul_(2).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    (2 * F.relu(F.instance_norm(x))).sum().backward()
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def test_inference_mode():
    theirs, ours = chain("relu")
    with torch.inference_mode():
        x = torch.randn(1, 6, 4, 4, 4)
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (2, 6, 1, 1, 1)), ({"affine": True}, (2, 5, 3, 3, 3)), ({}, (2, 6, 3, 3)[:3]), ({}, (0, 6, 3, 3, 3))],
)
def test_errors_are_those_of_torch(options, shape):
    def outcome(module):
        try:
            return module(torch.randn(shape)).shape
        except Exception as error:
            return type(error), str(error)

    theirs, ours = pair(**options)
    assert outcome(ours) == outcome(theirs)
    chained = models(nn.InstanceNorm3d(6, **options), nn.ReLU())
    assert outcome(chained[1]) == outcome(chained[0])


def test_any_number_of_channels_where_nothing_depends_on_it():
    theirs, ours = models(nn.InstanceNorm3d(6), nn.ReLU())
    x = torch.randn(2, 4, 3, 3, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_close(ours(x), theirs(x))
    assert len(seen) == 2


def test_wrong_numbers_of_slopes_are_torch_s_error():
    _, ours = models(nn.InstanceNorm3d(6), nn.PReLU(4))
    with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
        ours(torch.randn(1, 6, 3, 3, 3))
