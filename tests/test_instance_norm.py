"""`InstanceNorm3d` and the activation behind it: torch's results, errors and gradients of any order."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pyvolconv
from pyvolconv.backends import cpp_instance_norm
from pyvolconv.instance_norm import _Call, instance_norm_activation

pytestmark = pytest.mark.skipif(not cpp_instance_norm.is_available(), reason="no compiled module")

LAYOUTS = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}
ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "one_slope": lambda: nn.PReLU(init=0.3),
    "slopes": lambda: nn.PReLU(6, init=-0.1),
}
SHAPES = [(2, 6, 5, 4, 7), (1, 6, 33, 31, 30), (6, 6, 1, 2, 3), (1, 6, 1, 1, 2), (40, 6, 3, 4, 5)]


def pair(channels=6, **options):
    """torch's module and ours with the same parameters, none of them trivial."""
    theirs, ours = nn.InstanceNorm3d(channels, **options), pyvolconv.InstanceNorm3d(channels, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def settings(activation):
    """What `instance_norm_activation` takes for an activation of ACTIVATIONS."""
    if activation in ("one_slope", "slopes"):
        return {}
    return {"activation": activation, "negative_slope": 0.2}


def by_torch(activation, x, weight, bias, slopes, eps=1e-5):
    z = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if slopes is not None:
        return F.prelu(z, slopes)
    return {"none": lambda: z, "relu": lambda: F.relu(z), "leaky_relu": lambda: F.leaky_relu(z, 0.2)}[activation]()


def operands(activation, channels=6, dtype=torch.float32, affine=True):
    """weight, bias, slopes."""
    weight, bias = (torch.randn(channels).to(dtype) if affine else None for _ in range(2))
    slopes = {"one_slope": torch.tensor([0.3]), "slopes": torch.randn(channels)}.get(activation)
    return weight, bias, None if slopes is None else slopes.to(dtype)


def leaves(*tensors, dtype=None):
    return [None if one is None else one.detach().to(dtype or one.dtype).requires_grad_() for one in tensors]


@pytest.fixture
def nodes(monkeypatch):
    """The calls that made a node of ours."""
    seen = []
    forward = _Call.forward

    def counted(call, *arguments):
        seen.append(call)
        return forward(call, *arguments)

    monkeypatch.setattr(_Call, "forward", counted)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mean", [0, 10, 1000])
def test_values_and_gradients(isa, layout, activation, mean):
    """Within the rounding of x, y and the gradients of float64, at any mean, where torch loses more."""
    eps = torch.finfo(torch.float32).eps
    for number, shape in enumerate(SHAPES):
        x = (mean + 2 * torch.randn(shape)).to(memory_format=LAYOUTS[layout])
        weight, bias, slopes = operands(activation, affine=number % 3 != 1)
        mine, wide = leaves(x, weight, bias, slopes), leaves(x, weight, bias, slopes, dtype=torch.float64)
        y = instance_norm_activation(*mine, **settings(activation), keep_channels_last=True)
        exact = by_torch(activation, *wide)
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        assert float((y - exact).abs().max()) <= 8 * eps * float(exact.abs().max()) + eps
        # Where rounding decides whether z is positive, no gradient.
        unsure = by_torch("none", *wide[:3], None).abs() < 1e-4
        grad = torch.where(unsure, 0, 1 + torch.randn(shape)).to(memory_format=LAYOUTS[layout])
        y.backward(grad)
        # For one sample and a gradient in channels_last_3d torch's own gradients are wrong.
        exact.backward(grad.double().contiguous())
        size, deviation = float(grad.abs().max()), float(x.double().var((2, 3, 4), correction=0).add(1e-5).min()) ** 0.5
        steepest = size / deviation * (1 if weight is None else float(weight.abs().max()))
        for got, expected in zip(mine, wide, strict=True):
            if got is not None:
                terms = steepest if got is mine[0] else size * x.numel() ** 0.5
                error = float((got.grad - expected.grad).abs().max())
                assert error <= 16 * eps * (float(expected.grad.abs().max()) + terms)
        assert mine[0].grad.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 8, 12, 16, 17, 24, 32, 33, 40, 48, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_channels_and_voxels(isa, channels, dtype):
    """Rows of whole vectors end anywhere; nothing beyond a tensor is read as its own."""
    limit = 1e-10 if dtype == torch.float64 else 1e-3
    for voxels in ((1, 1, 2), (1, 3, 5), (2, 3, 4), (9, 11, 13)):
        x, grad = (torch.randn(2, channels, *voxels, dtype=torch.float64) for _ in range(2))
        weight, bias, slopes = operands("slopes", channels, torch.float64)
        x, grad, weight, bias, slopes = (one.to(dtype).double() for one in (x, grad, weight, bias, slopes))
        expected = leaves(x, weight, bias, slopes)
        exact = by_torch("slopes", *expected)
        unsure = by_torch("none", *expected[:3], None).abs() < 1e-4
        grad = torch.where(unsure, 0, grad)
        exact.backward(grad)
        for memory_format in LAYOUTS.values():
            mine = leaves(x.to(memory_format=memory_format), weight, bias, slopes, dtype=dtype)
            y = instance_norm_activation(*mine, keep_channels_last=True)
            y.backward(grad.to(dtype))
            results = [y, *(leaf.grad for leaf in mine)]
            for got, wanted in zip(results, [exact, *(leaf.grad for leaf in expected)], strict=True):
                assert got.shape == wanted.shape
                # Two voxels make a variance near eps, whose inverse magnifies rounding.
                assert float((got - wanted).abs().max()) <= limit * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 3, 40, 41, 42), (3, 32, 20, 20, 20), (1, 1, 64, 64, 64), (9, 1, 30, 30, 30)])
def test_same_bits_at_every_thread_count(isa, threads, layout, shape):
    x, grad = (torch.randn(shape).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias, slopes = operands("slopes", shape[1])
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        mine = leaves(x, weight, bias, slopes)
        y = instance_norm_activation(*mine, keep_channels_last=True)
        y.backward(grad)
        results.append([y, *(leaf.grad for leaf in mine)])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("mean", [10, 1000])
def test_gradient_of_the_weight_at_a_large_mean(mean):
    """Group normalization's is wrong in the third digit at a mean of ten."""
    x, grad = mean + torch.randn(1, 4, 40, 40, 40), 1 + torch.randn(1, 4, 40, 40, 40)
    weight, bias, _ = operands("none", 4)
    mine, wide = leaves(x, weight, bias), leaves(x, weight, bias, dtype=torch.float64)
    instance_norm_activation(*mine).backward(grad)
    F.instance_norm(wide[0], weight=wide[1], bias=wide[2]).backward(grad.double())
    torch.testing.assert_close(mine[1].grad.double(), wide[1].grad, rtol=1e-5, atol=1e-3)


def test_planes_of_one_value_and_values_that_are_not_finite():
    x = torch.randn(2, 3, 4, 4, 4)
    x[0, 0] = 5.25
    x[0, 1, 1, 2, 3] = float("inf")
    x[1, 2, 0, 0, 0] = float("nan")
    y, expected = instance_norm_activation(x, None, None, activation="relu"), F.relu(F.instance_norm(x))
    assert torch.equal(y[0, 0], torch.zeros(4, 4, 4))  # torch's are as large as rounding makes them
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y[1], expected[1], equal_nan=True)


def test_gradients_of_what_is_asked_for():
    x, weight, bias = torch.randn(2, 3, 4, 4, 4), torch.ones(3, requires_grad=True), torch.ones(3)
    y = instance_norm_activation(x, weight, bias)
    assert [edge[0] is not None for edge in y.grad_fn.next_functions[:3]] == [False, True, False]
    y.sum().backward()  # a gradient without strides
    torch.testing.assert_close(weight.grad, torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_and_gradgradcheck(activation, layout):
    x = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    inputs = leaves(x, *operands(activation, 3, torch.float64)[:2])
    slopes = {"one_slope": torch.tensor([0.3]), "slopes": torch.tensor([0.3, -0.2, 1.5])}.get(activation)
    inputs += leaves(None if slopes is None else slopes.double())

    def function(*tensors):
        return instance_norm_activation(*tensors, **settings(activation), keep_channels_last=True)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_the_formula_is_what_the_kernel_computes():
    call = _Call("ncdhw", 1e-5, "leaky_relu", 0.2)
    x, grad = (torch.randn(2, 3, 4, 5, 6, dtype=torch.float64) for _ in range(2))
    weight, bias, _ = operands("none", 3, torch.float64)
    _, statistics = call.forward(x, weight, bias, None)
    wanted = (True, True, True, False)
    with torch.no_grad():
        got = call.backward(grad, (x, weight, bias, None, statistics), wanted)
    expected = call.formula(grad, x, weight, bias, None, wanted)
    for one, other in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other)


def models(*layers):
    """A model of torch's, and its copy, accelerated."""
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, pyvolconv.accelerate(copy.deepcopy(model), keep_channels_last=True)


def chain(activation):
    return models(nn.InstanceNorm3d(6, affine=True), nn.Dropout(0.0), ACTIVATIONS[activation]())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "one_slope", "slopes"])
@pytest.mark.parametrize("training", [True, False])
def test_chains_are_found_and_agree(activation, training, nodes):
    theirs, ours = (model.train(training) for model in chain(activation))
    x = torch.randn(2, 6, 5, 6, 7)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(torch.ones_like(y).cumsum(2))
        results.append([y, leaf.grad, *(parameter.grad for parameter in model.parameters())])
    assert len(nodes) == 1
    assert y.grad_fn.name() == "InstanceNormFunctionBackward"
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        assert got.stride() == expected.stride()
    name = type(theirs[-1]).__name__
    assert [row.became for row in pyvolconv.fusion_report(ours).rows] == [
        f"InstanceNorm3d + Dropout + {name} in one pass"
    ]


def test_the_report_says_why_not():
    def reason(*layers):
        rows = pyvolconv.fusion_report(pyvolconv.accelerate(nn.Sequential(*layers))).rows
        return next(row.why_not for row in rows if row.became == "InstanceNorm3d alone")

    assert reason(nn.InstanceNorm3d(2), nn.GELU()) == "GELU follows, which does not run in its pass"
    assert reason(nn.InstanceNorm3d(2), nn.Tanh()) == "Tanh follows, which does not run in its pass"
    assert (
        reason(nn.InstanceNorm3d(2, track_running_stats=True), nn.ReLU()) == "InstanceNorm3d keeps running statistics"
    )
    assert reason(nn.InstanceNorm3d(2)) == "nothing follows"
    dropping = reason(nn.InstanceNorm3d(2), nn.Dropout(0.5), nn.ReLU())
    assert dropping == "Dropout is in training mode; otherwise InstanceNorm3d + Dropout + ReLU in one pass"
    convolution = pyvolconv.fusion_report(nn.Sequential(pyvolconv.Conv3d(1, 2, 3), pyvolconv.InstanceNorm3d(2))).rows[0]
    assert convolution.why_not == "InstanceNorm3d follows, which reads all of its input before it writes"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv3d(2, 2, 3, padding=1), nn.InstanceNorm3d(2, affine=True), nn.PReLU()
        self.again = nn.InstanceNorm3d(2)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return F.leaky_relu(self.again(y), 0.1) + x


def test_chains_in_forward_code(nodes):
    theirs = Block()
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = torch.randn(1, 2, 6, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert [call.activation for call in nodes] == ["none", "leaky_relu"]
    became = [row.became for row in pyvolconv.fusion_report(ours).rows[1:]]
    assert became == ["InstanceNorm3d + PReLU in one pass", "InstanceNorm3d + LeakyReLU in one pass"]
    ours.act.register_forward_hook(lambda *seen: None)
    nodes.clear()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert len(nodes) == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_are_called(place):
    _, ours = chain("relu")
    seen = []
    ours[place].register_forward_hook(lambda module, args, result: seen.append(result))
    x = torch.randn(1, 6, 4, 4, 4)
    y = ours(x)
    assert len(seen) == 1
    assert place != 2 or seen[0] is y
    assert pyvolconv.fusion_report(ours).rows[0].became == "InstanceNorm3d alone"


def test_dropout_that_drops_is_called(nodes):
    _, ours = models(nn.InstanceNorm3d(6), nn.Dropout(1.0), nn.ReLU())
    x = torch.randn(1, 6, 4, 4, 4)
    assert not ours.train()(x).any()
    assert ours.eval()(x).any()
    assert [call.activation for call in nodes] == ["none", "relu"]


class TheirNorm(nn.InstanceNorm3d):
    def forward(self, input):
        return super().forward(input) + 1


def test_subclasses_keep_what_they_do(nodes):
    theirs, ours = models(TheirNorm(6), nn.ReLU())
    x = torch.randn(1, 6, 4, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert [call.activation for call in nodes] == ["none"]


def test_accelerate_reverts_and_pickles(nodes):
    model = nn.Sequential(nn.Conv3d(1, 6, 3), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU(inplace=True))
    x = torch.randn(1, 1, 6, 6, 6).to(memory_format=torch.channels_last_3d)
    expected = model(x)
    pyvolconv.accelerate(model)
    norm = model[1]
    assert isinstance(norm, pyvolconv.InstanceNorm3d)
    torch.testing.assert_close(model(x), expected)
    assert not norm.keeps_channels_last
    assert type(pickle.loads(pickle.dumps(model))[1]) is nn.InstanceNorm3d
    assert isinstance(copy.deepcopy(model)[1], pyvolconv.InstanceNorm3d)
    nodes.clear()
    assert pyvolconv.accelerate(model, keep_channels_last=True)[1] is norm
    assert norm.keeps_channels_last
    torch.testing.assert_close(model(x), expected)
    assert len(nodes) == 1
    assert not pyvolconv.accelerate(model)[1].keeps_channels_last
    pyvolconv.revert(model)
    assert type(norm) is nn.InstanceNorm3d
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_strides_of_channels_last(keep, grad):
    """Torch's results are contiguous, and so are ours where nobody asked for more."""
    theirs, ours = pair(affine=True)
    ours.keeps_channels_last = keep
    x = torch.randn(2, 6, 4, 5, 6).to(memory_format=torch.channels_last_3d).requires_grad_(grad)
    expected, y = theirs(x), ours(x)
    torch.testing.assert_close(y, expected)
    if keep:
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
    else:
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()


@pytest.mark.parametrize("shape", [(2, 6, 5, 4, 7), (6, 3, 4, 5), (1, 6, 1, 1, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_module_alone(shape, affine, nodes):
    theirs, ours = pair(affine=affine)
    x = torch.randn(shape)
    expected, y = theirs(x), ours(x)
    assert len(nodes) == 1
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()


def untouched():
    yield "running statistics", {"track_running_stats": True}, torch.randn(2, 6, 4, 4, 4)
    yield "half", {}, torch.randn(2, 6, 4, 4, 4).half()
    yield "strided", {}, torch.randn(2, 6, 4, 4, 8)[..., ::2]
    yield "parameters of another dtype", {"affine": True, "dtype": torch.float32}, torch.randn(2, 6, 4, 4, 4).bfloat16()


@pytest.mark.parametrize(("options", "x"), [pytest.param(*case, id=name) for name, *case in untouched()])
@pytest.mark.parametrize("training", [True, False])
def test_the_rest_is_torch_to_the_bit(options, x, training, nodes):
    theirs, ours = (module.train(training) for module in pair(**options))
    expected, y = theirs(x), ours(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    for buffer, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(buffer, other)
    assert nodes == []


def test_autocast_decides_as_for_torch(nodes):
    theirs, ours = pair(affine=True)
    x = torch.randn(1, 6, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    assert nodes == []


def test_transforms_and_tracers_are_torch_s(nodes):
    theirs, ours = chain("slopes")
    x = torch.randn(2, 6, 3, 3, 3)

    def loss(model):
        return lambda value: model(value).square().sum()

    torch.testing.assert_close(torch.func.grad(loss(ours))(x), torch.func.grad(loss(theirs))(x))
    torch.testing.assert_close(torch.func.vmap(ours)(x[None]), theirs(x)[None])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x).cumsum(2))
        tangents = [forward_ad.unpack_dual(model(dual)).tangent for model in (ours, theirs)]
    torch.testing.assert_close(*tangents)
    traced = torch.jit.trace(ours, x, check_trace=False)
    torch.testing.assert_close(traced(x), theirs(x))
    assert "InstanceNormFunction" not in str(traced.graph)
    exported = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(exported(x), theirs(x))
    assert nodes == []


@pytest.mark.slow
def test_compiled_models_are_torch_s(nodes):
    theirs, ours = chain("leaky_relu")
    x = torch.randn(2, 6, 3, 3, 3)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))
    assert nodes == []


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
        torch.testing.assert_close(got, expected)


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
        torch.testing.assert_close(ours(x), theirs(x))


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
        torch.testing.assert_close(ours(x), theirs(x))
    assert len(seen) == 2


def test_wrong_numbers_of_slopes_are_torch_s_error():
    _, ours = models(nn.InstanceNorm3d(6), nn.PReLU(4))
    with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
        ours(torch.randn(1, 6, 3, 3, 3))
