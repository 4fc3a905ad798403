"""`conv3d_max_pool` through its public function: values, derivatives, transforms, and torch around it."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyvolconv
from pyvolconv import fused_ops
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.fused_derivatives import use_dense_backward

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
GEOMETRY = {"padding": 1, "groups": 2, "stride": (1, 2, 1)}
POOLS = {
    "2ceil": {"pool_size": 2, "ceil_mode": True},
    "3s2p1": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "1x2x2": {"pool_size": (1, 2, 2)},
}
WITH_PASSES = ("cpp", "numba")
WITHOUT_PASSES = ("im2col", "aten")
"""The operator puts their plain pass and torch's pooling together."""


def ours(activation="relu", pool="2ceil", **geometry):
    options = {**(geometry or GEOMETRY), **POOLS[pool], "activation": activation, "negative_slope": 0.2}
    return lambda x, w, b=None: pyvolconv.conv3d_max_pool(x, w, b, **options)


def theirs(activation="relu", pool="2ceil", **geometry):
    sizes = POOLS[pool]
    window = sizes["pool_size"]
    arguments = (sizes.get("pool_stride", window), sizes.get("pool_padding", 0), 1, sizes.get("ceil_mode", False))
    geometry = geometry or GEOMETRY

    def function(x, w, b=None):
        return F.max_pool3d(ACTIVATIONS[activation](F.conv3d(x, w, b, **geometry)), window, *arguments)

    return function


def operands(dtype=torch.float64, size=(4, 6, 5), layout=torch.contiguous_format, batch=2):
    x, w = torch.randn(batch, 4, *size, dtype=dtype), torch.randn(6, 2, 2, 3, 2, dtype=dtype)
    several = (x.contiguous(memory_format=layout), w.contiguous(memory_format=layout), torch.randn(6, dtype=dtype))
    return tuple(tensor.requires_grad_() for tensor in several)


ACTIVATION_AND_POOL = [
    *itertools.product(ACTIVATIONS, ["2ceil"]),
    ("relu", "3s2p1"),
    ("silu", "3s2p1"),
    ("relu", "1x2x2"),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
@pytest.mark.parametrize("name", [*WITH_PASSES, *WITHOUT_PASSES])
def test_values_and_gradients_are_torchs(name, activation, pool, layout, poisoned):
    args = operands(layout=layout)
    expected = theirs(activation, pool)(*args)
    cotangent = torch.randn_like(expected)
    with pyvolconv.use_backend(name):
        y = ours(activation, pool)(*args)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    # Outside of the block: a gradient keeps the backend of its forward call.
    torch.testing.assert_close(torch.autograd.grad(y, args, cotangent), torch.autograd.grad(expected, args, cotangent))


class Called(TorchDispatchMode):
    """The names of the operators that ran in the block."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
def test_dense_backward_gives_the_same_gradients(activation, pool, layout, poisoned):
    args = operands(layout=layout)
    with use_dense_backward():
        y = ours(activation, pool)(*args)
    with Called() as forward:
        sparse_y = ours(activation, pool)(*args)
    assert "conv3d_max_pool" in forward.names
    cotangent = torch.randn_like(y)
    with Called() as dense:  # outside of the block: a gradient keeps what its forward call was told
        got = torch.autograd.grad(y, args, cotangent)
    with Called() as sparse:
        expected = torch.autograd.grad(sparse_y, args, cotangent)
    torch.testing.assert_close(got, expected)
    assert {"conv3d_grad_input", "conv3d_grad_weight", "scatter_add"} <= dense.names
    assert not {"conv3d_max_pool_grad_input", "conv3d_max_pool_grad_weight"} & dense.names
    assert {"conv3d_max_pool_grad_input", "conv3d_max_pool_grad_weight"} <= sparse.names


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1, 2}])
def test_dense_backward_of_some_operands(wanted):
    args = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(operands(size=(3, 4, 4)))]
    with use_dense_backward():
        assert gradcheck(ours("leaky_relu"), args)
        assert gradgradcheck(ours("leaky_relu"), args)


def test_dense_backward_inside_of_transforms():
    x, w, b = operands()

    def loss(function, w):
        return function(x, w, b).square().sum()

    expected = jacrev(jacrev(partial(loss, theirs())))(w)
    with use_dense_backward():
        torch.testing.assert_close(jacrev(jacrev(partial(loss, ours())))(w), expected)


@st.composite
def calls(draw):
    """(shape of x, shape of w, geometry of the convolution, arguments of max_pool3d, activation), all of which fit."""

    def triple(low, high):
        return st.tuples(*[st.integers(low, high)] * 3)

    groups = draw(st.integers(1, 3))
    kernel, dilation, padding, stride = draw(triple(1, 3)), draw(triple(1, 2)), draw(triple(0, 2)), draw(triple(1, 3))
    window, ceil_mode = draw(triple(1, 4)), draw(st.booleans())
    pool_padding = tuple(draw(st.integers(0, size // 2)) for size in window)
    dense = [draw(st.integers(size - 2 * pad, size + 5)) for size, pad in zip(window, pool_padding, strict=True)]
    input_size = [
        max((size - 1) * s + d * (k - 1) + 1 - 2 * p, 1)
        for size, s, d, k, p in zip(map(partial(max, 1), dense), stride, dilation, kernel, padding, strict=True)
    ]
    channels = draw(st.integers(1, 5))
    return (
        (draw(st.integers(1, 3)), groups * channels, *input_size),
        (groups * draw(st.integers(1, 9)), channels, *kernel),
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        (window, draw(triple(1, 4)), pool_padding, 1, ceil_mode),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
    )


@settings(max_examples=100)
@given(calls(), st.sampled_from(WITH_PASSES), st.sampled_from([torch.contiguous_format, torch.channels_last_3d]))
def test_any_call_is_torchs(call, name, layout):
    input_shape, weight_shape, geometry, pool, activation = call
    x, w = (torch.randn(shape).double().contiguous(memory_format=layout) for shape in (input_shape, weight_shape))
    args = tuple(tensor.requires_grad_() for tensor in (x, w, torch.randn(weight_shape[0]).double()))
    expected = F.max_pool3d(ACTIVATIONS[activation](F.conv3d(*args, **geometry)), *pool)
    with pyvolconv.use_backend(name):
        y = pyvolconv.conv3d_max_pool(
            *args,
            **geometry,
            activation=activation,
            negative_slope=0.2,
            **dict(zip(("pool_size", "pool_stride", "pool_padding"), pool, strict=False)),
            ceil_mode=pool[-1],
        )
        torch.testing.assert_close(y, expected)
        cotangent = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, args, cotangent), torch.autograd.grad(expected, args, cotangent)
        )


@pytest.mark.parametrize("wanted", [which for which in itertools.product([False, True], repeat=3) if any(which)])
def test_gradients_of_any_subset_of_the_operands(wanted):
    args = tuple(arg.detach().requires_grad_(want) for arg, want in zip(operands(), wanted, strict=True))
    inputs = [arg for arg in args if arg.requires_grad]
    y, expected = ours()(*args), theirs()(*args)
    cotangent = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_never_computes_a_gradient_that_nobody_needs(monkeypatch):
    """The first layer's input asks for none."""
    for backend in REGISTRY:
        if backend.has_max_pool:
            monkeypatch.setattr(type(backend), "grad_input_max_pool", None)
    x, w, b = operands()
    ours()(x.detach(), w, b).sum().backward()
    assert w.grad is not None
    assert b.grad is not None


@pytest.mark.parametrize("name", WITH_PASSES)
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
def test_gradcheck(name, activation, pool):
    with pyvolconv.use_backend(name):
        assert gradcheck(
            ours(activation, pool),
            operands(),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            fast_mode=True,
        )


@pytest.mark.parametrize("name", WITH_PASSES)
@pytest.mark.parametrize(("activation", "pool"), ACTIVATION_AND_POOL)
def test_gradgradcheck(name, activation, pool):
    with pyvolconv.use_backend(name):
        assert gradgradcheck(
            ours(activation, pool),
            operands(size=(3, 4, 3)),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
            fast_mode=True,
        )


@pytest.mark.parametrize("name", WITH_PASSES)
def test_gradcheck_in_full(name):
    x, w, b = (tensor.detach() for tensor in operands(size=(2, 4, 2), batch=1))
    args = tuple(tensor.requires_grad_() for tensor in (x, w[:2, :, :1, :2].contiguous(), b[:2]))
    with pyvolconv.use_backend(name):
        assert gradcheck(ours("silu"), args)
        assert gradgradcheck(ours("silu"), args)


def scalar(function):
    """Cubic, so that second derivatives are neither zero nor constant."""
    return lambda *args: (function(*args) ** 3).sum()


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(jacfwd)": lambda f, arg: jacrev(jacfwd(f, arg), arg),
    "jacfwd(jacfwd)": lambda f, arg: jacfwd(jacfwd(f, arg), arg),
    "jacrev(jacrev)": lambda f, arg: jacrev(jacrev(f, arg), arg),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("arg", [0, 1, 2])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_function_transforms(activation, arg, transform):
    x, w, b = (tensor.detach() for tensor in operands(size=(2, 3, 2), batch=1))
    args = (x, w[:2, :, :, :1, :].contiguous(), b[:2])
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(
        apply(scalar(ours(activation)), arg)(*args), apply(scalar(theirs(activation)), arg)(*args)
    )


def test_mixed_second_derivatives():
    args = tuple(tensor.detach() for tensor in operands(size=(3, 3, 3)))

    def mixed(function):
        gradients = grad(scalar(function), (0, 1, 2))
        tangents = tuple(torch.ones_like(arg) for arg in args)
        return jvp(gradients, args, tangents)[1], vjp(gradients, *args)[1](tangents)

    torch.testing.assert_close(mixed(ours("silu")), mixed(theirs("silu")))


IN_DIMS = [dims for dims in itertools.product([None, 0, -1], repeat=3) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_over_every_combination_of_operands(in_dims):
    mapped = []
    for several, dim in zip(zip(*[operands() for _ in range(3)], strict=True), in_dims, strict=True):
        several = [tensor.detach() for tensor in several]
        mapped.append(several[0] if dim is None else torch.stack(several, dim))
    pairs = [(ours(), theirs())]
    pairs += [(grad(scalar(ours()), arg), grad(scalar(theirs()), arg)) for arg in range(3)]
    for got, expected in pairs:
        torch.testing.assert_close(vmap(got, in_dims)(*mapped), vmap(expected, in_dims)(*mapped))


def sizes(activation="relu"):
    return ([1, 2, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1], 2, activation, 0.2, [2, 2, 2], [2, 2, 2], [0, 0, 0], True)


@pytest.mark.parametrize(
    ("activation", "layout"), [("relu", torch.channels_last_3d), ("silu", torch.contiguous_format)]
)
def test_opcheck(activation, layout):
    x, w, b = operands(torch.float32, layout=layout)
    torch.library.opcheck(fused_ops.conv3d_max_pool, (x, w, b, *sizes(activation)))
    value, code = fused_ops.conv3d_max_pool(x, w, b, *sizes(activation))
    value, rest = value.detach().requires_grad_(), (*sizes()[:4], *sizes()[6:])
    torch.library.opcheck(fused_ops.conv3d_max_pool_grad_input, (value, code, w, list(x.shape[2:]), *rest))
    torch.library.opcheck(fused_ops.conv3d_max_pool_grad_weight, (value, code, x, list(w.shape[2:]), True, *rest))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    x, w, b = operands(torch.float32)
    compiled = torch.compile(ours("silu"), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 4, 6, 5, requires_grad=True)
        y, expected = compiled(x, w, b), theirs("silu")(x, w, b)
        torch.testing.assert_close(y, expected)
        cotangent = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, w, b), cotangent), torch.autograd.grad(expected, (x, w, b), cotangent)
        )


def test_autocast():
    x, w, b = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours()(x, w, b), theirs()(x, w, b)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_without_a_fused_pass_are_put_together(dtype):
    args = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in operands())
    y, expected = ours("gelu")(*args), theirs("gelu")(*[arg.detach().float() for arg in args])
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert all(got.dtype == dtype for got in torch.autograd.grad(y.sum(), args))


def test_flop_counter():
    """Forward as torch counts the convolution; each gradient two per chosen voxel and weight."""
    x, w, b = operands()
    with FlopCounterMode(display=False) as counter:
        y = ours()(x, w, b)
    with FlopCounterMode(display=False) as plain:
        F.conv3d(x, w, b, **GEOMETRY)
    assert counter.get_total_flops() == plain.get_total_flops() > 0
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * (2 * y.numel() * w[0].numel())


def test_one_sample_and_an_empty_batch():
    _, w, b = operands()
    for shape in ((4, 4, 6, 5), (0, 4, 4, 6, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y, expected = ours()(x, w, b), theirs()(x, w, b)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b))
        )


def test_keeps_one_byte_per_pooled_value():
    """Saved for backward: operands and code, and nothing of the size of what is pooled."""
    x, w, b = operands(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = ours()(x, w, b)
    extra = [tensor for tensor in saved if all(tensor.data_ptr() != known.data_ptr() for known in (x, w, y))]
    assert [(tensor.dtype, tensor.shape) for tensor in extra] == [(torch.uint8, y.shape)]


def test_relu_and_leaky_relu_have_torchs_derivative_at_zero_and_nan():
    x = torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0, float("inf")]).view(6, 1, 1, 1, 1)
    w = torch.ones(1, 1, 1, 1, 1)
    for activation in ("none", "relu", "leaky_relu"):
        gradients = []
        for function in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = function(activation, "1x2x2", padding=0)(leaf.expand(6, 1, 1, 2, 2), w)
            gradients.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
        torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' must be one of"),
        ({"activation": "leaky_relu", "negative_slope": -1.0}, "negative_slope=-1.0 must be finite and not negative"),
        ({"pool_size": "2"}, "pool_size='2', pool_stride=None and pool_padding=0 must each be one int or three"),
        ({"pool_size": (7, 7, 7)}, "has more than 255 voxels"),
        ({"pool_padding": 2}, "must lie between 0 and half of"),
    ],
)
def test_refuses_impossible_epilogues(options, message):
    x, w, b = operands()
    with pytest.raises(ValueError, match=message):
        pyvolconv.conv3d_max_pool(x, w, b, groups=2, **options)


def test_wrong_arguments_raise_what_torch_raises():
    x, w, b = operands()
    for args, pool in (((x[:, :3], w, b), 2), ((x, w.float(), b), 2), ((x, w, b), 9)):
        with pytest.raises(RuntimeError) as expected:
            F.max_pool3d(F.conv3d(*args, groups=2), pool)
        with pytest.raises(RuntimeError) as raised:
            pyvolconv.conv3d_max_pool(*args, groups=2, pool_size=(pool, 5, 5) if pool == 9 else pool)
        assert str(raised.value)[:40] == str(expected.value)[:40]
