"""The short way of ordinary calls: the operator's results, and whoever wants to see an operator still sees it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyvolconv
from pyvolconv import activation_functional, dispatch, fused_functional, shortcut
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.ordinary import is_ordinary
from pyvolconv.problem import ConvProblem

from .closeness import assert_close

OPERATOR = torch.ops.pyvolconv.conv3d.default


@pytest.fixture
def x():
    return torch.randn(2, 3, 5, 6, 7)


@pytest.fixture
def w():
    return torch.randn(4, 3, 3, 3, 3)


@pytest.fixture(params=["conv3d", "conv3d_activation", "conv3d_max_pool"])
def function(request):
    return getattr(pyvolconv, request.param)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def short(function, *args, **kwargs):
    """Whether a call goes the short way: it then makes no operator call of this package, which a node would show."""
    module = {"conv3d_activation": activation_functional, "conv3d_max_pool": fused_functional}
    known = module.get(function.__name__, shortcut)._calls
    known.clear()
    function(*args, **kwargs)
    return bool(known) and None not in known.values()


def test_same_bits_as_the_operator(float32_problem):
    problem = float32_problem
    memory_format = MEMORY_FORMAT[problem.layout]
    x, w = (torch.randn(s).contiguous(memory_format=memory_format) for s in (problem.input_shape, problem.weight_shape))
    b = torch.randn(problem.out_channels) if problem.bias else None
    operands = [tensor.requires_grad_() for tensor in (x, w, b) if tensor is not None]
    geometry = (problem.stride, [side for pair in problem.padding for side in pair], problem.dilation, problem.groups)
    expected = OPERATOR(x, w, b, *geometry)
    if all(begin == end for begin, end in problem.padding):
        padding = tuple(begin for begin, _ in problem.padding)
        assert short(pyvolconv.conv3d, x, w, b, problem.stride, padding, problem.dilation, problem.groups)
        y = pyvolconv.conv3d(x, w, b, problem.stride, padding, problem.dilation, problem.groups)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        assert y.grad_fn.name() == expected.grad_fn.name()
        cotangent = torch.randn_like(y)
        with Watch() as watch:
            long = torch.autograd.grad(expected, operands, cotangent)
        assert any("pyvolconv" in name for name in watch.seen)
        for got, wanted in zip(torch.autograd.grad(y, operands, cotangent), long, strict=True):
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", MEMORY_FORMAT)
@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"padding": 1, "output_padding": (0, 2, 1), "stride": 3}],
    ids=str,
)
def test_transposed_the_same_as_the_long_way(geometry, layout, with_bias):
    memory_format = MEMORY_FORMAT[layout]
    x, w = torch.randn(2, 6, 4, 5, 3), torch.randn(6, 4, 3, 2, 3)
    x, w = (tensor.to(memory_format=memory_format).requires_grad_() for tensor in (x, w))
    operands = [x, w, torch.randn(4, requires_grad=True)] if with_bias else [x, w]
    with Watch() as watch:
        expected = pyvolconv.conv_transpose3d(*operands, **geometry)
    assert "pyvolconv.conv3d_grad_input.default" in watch.seen
    shortcut._transposed_calls.clear()
    y = pyvolconv.conv_transpose3d(*operands, **geometry)
    assert None not in shortcut._transposed_calls.values()
    assert len(shortcut._transposed_calls) == 1
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    cotangent = torch.randn_like(y)
    with Watch():
        long = torch.autograd.grad(expected, operands, cotangent)
    for got, wanted in zip(torch.autograd.grad(y, operands, cotangent), long, strict=True):
        assert torch.equal(got, wanted)
    torch.testing.assert_close(y, F.conv_transpose3d(*operands, **geometry), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(pyvolconv.conv_transpose3d(*operands, **geometry), expected)


def test_transposed_of_other_operands(w):
    for x in (torch.randn(4, 5, 6, 7), torch.randn(2, 4, 7, 6, 5).transpose(2, 4), torch.randn(1, 4, 5, 6, 7)):
        for bias in (None, torch.randn(6)[::2], torch.randn(3)):
            theirs = F.conv_transpose3d(x, w, bias)
            torch.testing.assert_close(pyvolconv.conv_transpose3d(x, w, bias), theirs, rtol=1e-4, atol=1e-4)
    only = torch.randn(3, requires_grad=True)
    pyvolconv.conv_transpose3d(torch.randn(1, 4, 5, 6, 7), w, only).sum().backward()
    assert torch.equal(only.grad, torch.full((3,), float(7 * 8 * 9)))


def test_ordinary_calls_are_short(function, x, w):
    b = torch.randn(4)
    assert short(function, x, w)
    assert short(function, x, w, b, padding=1)
    assert short(function, x, w, b, 1, (1, 0, 1), 1, 1)
    assert short(function, x, torch.nn.Parameter(w), padding="same")
    assert short(function, x.double(), w.double())
    with torch.no_grad():
        assert short(function, x, w.clone().requires_grad_())
    with torch.inference_mode():
        assert short(function, x, w)
        assert short(function, x.clone(), w.clone())
    last = torch.channels_last_3d
    assert short(function, x.to(memory_format=last), w.to(memory_format=last))
    with pyvolconv.use_backend("im2col"):
        assert short(function, x, w)


def test_what_the_short_way_has_no_answer_for_goes_the_long_way(function, x, w):
    assert not short(function, x[0], w)
    assert not short(function, x.transpose(3, 4), w)
    assert not short(function, x.to(memory_format=torch.channels_last_3d), w)
    assert not short(function, x, w, torch.zeros(1).expand(4))
    assert not short(function, x, w, stride=[1, 1, 1])
    assert not short(function, x[:0], w)


def test_operands_of_all_kinds(function, x, w):
    """One after the other, so that no call may be taken for an earlier one."""
    b, turned = torch.randn(4), torch.randn(2, 3, 7, 6, 5).transpose(2, 4)
    for dtype in (torch.float32, torch.float64):
        for source in (x, turned, x.to(memory_format=torch.channels_last_3d), x[:1].expand(2, 3, 5, 6, 7)):
            for bias in (None, b, torch.randn(8)[::2], torch.ones(1).expand(4)):
                args = (source.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
                expected = F.conv3d(*args)
                if function is pyvolconv.conv3d_activation:
                    expected = F.relu(expected)
                if function is pyvolconv.conv3d_max_pool:
                    expected = F.max_pool3d(expected, 2)
                torch.testing.assert_close(function(*args), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [True, 1.0, (1, 1, True), (1.0, 1, 1), None, "same", (1, 1)])
@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_equal_to_what_was_right_before_is_not_right(x, w, name, wrong):
    pyvolconv.conv3d(x, w, **{name: 1})
    pyvolconv.conv3d(x, w, **{name: (1, 1, 1)})
    pyvolconv.conv3d(x, w, groups=1)

    def outcome(function):
        try:
            return function(x, w, **{name: wrong}).shape
        except (TypeError, ValueError, RuntimeError) as error:
            return type(error)

    assert outcome(pyvolconv.conv3d) == outcome(F.conv3d)


def test_groups_that_equal_one(x, w):
    pyvolconv.conv3d(x, w, groups=1)
    for wrong in (1.0, "1"):
        with pytest.raises(TypeError):
            pyvolconv.conv3d(x, w, groups=wrong)


def test_gradients_are_wanted_or_not_from_call_to_call(function, x, w):
    assert not function(x, w).requires_grad
    assert function(x, w.requires_grad_()).requires_grad
    assert function(x, w, torch.randn(4)).requires_grad
    with torch.no_grad():
        assert not function(x, w).requires_grad
    with torch.inference_mode():
        assert function(x, w).is_inference()
    w.requires_grad_(False)
    assert not function(x, w).requires_grad
    assert function(x, w, torch.randn(4, requires_grad=True)).requires_grad


def test_second_derivatives_through_the_short_way(function):
    x = torch.randn(1, 1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    w, b = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64)
    assert short(function, x, w, b)
    assert torch.autograd.gradcheck(lambda x, w: function(x, w, b), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: function(x, w, b), (x, w))


@pytest.mark.parametrize("grad", [False, True])
def test_watchers_see_the_operator(function, x, w, grad):
    w.requires_grad_(grad)
    with Watch() as watch:
        assert not short(function, x, w)
    assert sum(name.startswith(f"pyvolconv.{function.__name__}.") for name in watch.seen) == 1
    with FlopCounterMode(display=False) as counter:
        function(x, w)
    assert counter.get_total_flops() > 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(x, w)
    assert f"pyvolconv::{function.__name__}" in {event.name for event in profile.events()}


def test_watchers_of_the_backward_pass_alone_see_its_operators(x, w):
    y = pyvolconv.conv3d(x.requires_grad_(), w.requires_grad_())
    with Watch() as watch:
        y.sum().backward()
    assert {name for name in watch.seen if "pyvolconv" in name} == {
        "pyvolconv.conv3d_grad_input.default",
        "pyvolconv.conv3d_grad_weight.default",
    }


def test_traces_hold_the_operator(function, x, w):
    graph = make_fx(lambda x: function(x, w))(x).graph
    assert any(f"pyvolconv.{function.__name__}" in str(node.target) for node in graph.nodes)
    # What is traced runs without this package, see tests/compilers.
    traced = torch.jit.trace(lambda x: function(x, w), (x,), check_trace=False)
    assert "aten::_convolution" in str(traced.graph)
    assert "pyvolconv::" not in str(traced.graph)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert function(torch.empty(2, 3, 5, 6, 7), torch.empty(4, 3, 3, 3, 3)).shape[:2] == (2, 4)


def test_transforms_and_dual_numbers_go_the_long_way(function, x, w):
    expected = torch.stack([function(one, w) for one in x.unsqueeze(1)])
    torch.testing.assert_close(torch.vmap(lambda one: function(one, w))(x.unsqueeze(1)), expected, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda x: function(x, w), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(x, torch.ones_like(x)), w)
        assert_close(forward_ad.unpack_dual(y).tangent, tangent)


def test_tensors_that_are_not_what_their_memory_holds(w):
    z = torch.randn(2, 3, 5, 6, 7, dtype=torch.complex64)
    negative = z.conj().imag
    assert negative.is_neg()
    assert not is_ordinary(negative)
    torch.testing.assert_close(pyvolconv.conv3d(negative, w), F.conv3d(negative.resolve_neg(), w), rtol=1e-4, atol=1e-4)
    assert not is_ordinary(z.conj())
    zero = torch._efficientzerotensor((2, 3, 5, 6, 7))
    assert not is_ordinary(zero)
    assert torch.equal(pyvolconv.conv3d(zero, w), torch.zeros(2, 4, 3, 4, 5))


def test_other_devices_layouts_and_subclasses_are_not_ordinary(x):
    class Mine(torch.Tensor):
        pass

    assert is_ordinary(x, None)
    for other in (x.to("meta"), x.to_sparse(), x.to_mkldnn()):
        assert not is_ordinary(x, other)
    assert type(pyvolconv.conv3d(x.as_subclass(Mine), torch.randn(4, 3, 3, 3, 3))) is Mine


def test_choices_are_made_in_every_call(function, x, w, monkeypatch):
    function(x, w)
    with dispatch.listen() as asked:
        function(x, w)
    assert [pass_ for _, pass_ in asked] == ["forward"]
    with pyvolconv.use_backend("numba"):
        assert torch.equal(function(x, w), function(x.clone(), w.clone()))
    monkeypatch.setenv("PYVOLCONV_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        function(x, w)


def test_saved_tensors_pass_the_hooks(function, x, w):
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x, w.requires_grad_()).sum().backward()
    assert {x.shape, w.shape} <= set(packed)


def test_modes_of_torch_functions_get_every_argument(function, x, w):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    expected = function(x, w, None, 1, 1)
    with Mode():
        assert torch.equal(function(x, w, None, 1, 1), expected)


def test_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(shortcut, "MOST_CALLS", 8)
    w = torch.randn(1, 1, 1, 1, 1)
    for size in range(1, 30):
        pyvolconv.conv3d(torch.randn(1, 1, 1, 1, size), w)
        assert len(shortcut._calls) <= 8


def test_problem_keeps_no_hash_of_another_process():
    problem = ConvProblem(1, 2, 3, (4, 5, 6), (3, 3, 3))
    hash(problem), problem.output_size
    code = "import pickle, sys; p = pickle.load(sys.stdin.buffer); print(hash(p) == hash(p.with_(batch=p.batch)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(problem),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert done.stdout.strip() == b"True"


def test_a_tensor_said_to_be_on_cuda_is_not_ordinary_and_starts_nothing():
    initialised = torch.cuda.is_initialized()
    with FakeTensorMode():
        said = torch.empty(2, 3, 5, 6, 7, device="cuda" if torch.cuda.is_available() else "meta")
        assert not is_ordinary(said)
    assert torch.cuda.is_initialized() == initialised


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ordinary_on_cuda(function, x, w):
    x, w = x.cuda(), w.cuda()
    assert is_ordinary(x, w)
    assert short(function, x, w)
    with pytest.raises(RuntimeError, match="device"):
        function(x, w.cpu())
    with Watch() as watch:
        function(x, w)
    assert any("pyvolconv" in name for name in watch.seen)
    with torch.autocast("cuda"):
        assert not is_ordinary(x)
