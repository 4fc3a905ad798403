"""`with pyvolconv.patch():` computes what others call `torch.nn.functional.conv3d` for, and changes nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.errors import UnsupportedProblemError

from .calls import error_of, heard, is_patched

CALLS = {
    "plain": (F.conv3d, (), {}),
    "by position": (F.conv3d, (None, 2, 1, 1, 1), {}),
    "by name": (F.conv3d, (), {"padding": "same", "dilation": (1, 2, 1), "bias": None}),
    "by the name in torch": (torch.conv3d, (), {"padding": [1, 0, 2], "groups": 1}),
    "transposed": (F.conv_transpose3d, (), {"stride": 2, "output_padding": 1}),
    "transposed by position": (torch.conv_transpose3d, (None, 2, 1, 1, 1, 1), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_same_call_same_result(call, x, w):
    function, args, options = CALLS[call]
    expected, passes = heard(function, x, w, *args, **options)
    assert passes == []
    with pyvolconv.patch():
        y, passes = heard(function, x, w, *args, **options)
        unbatched = function(x[0], w, *args, **options)
    assert passes == (["grad_input"] if "transpose" in function.__name__ else ["forward"])
    assert torch.equal(y, getattr(pyvolconv, function.__name__)(x, w, *args, **options))
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unbatched, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["input", "x", "a", "x1"])
def test_names_that_torch_takes_for_the_input(name, x, w):
    expected = F.conv3d(**{name: x}, weight=w)
    with pyvolconv.patch():
        y, passes = heard(F.conv3d, **{name: x}, weight=w)
    assert passes == ["forward"]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_ours_after_the_block(x, w):
    operands = [x.requires_grad_(), w.requires_grad_(), torch.randn(4, requires_grad=True)]
    expected = torch.autograd.grad(F.conv3d(*operands).square().sum(), operands)
    with pyvolconv.patch():
        y = F.conv3d(*operands)
    got, passes = heard(torch.autograd.grad, y.square().sum(), operands)
    assert passes == ["grad_input", "grad_weight"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)


class CallsFunctions(nn.Module):
    """As networks of others do: a module, a subclass that calls the function itself, and a weight that is a tensor."""

    class Same(nn.Conv3d):
        def forward(self, x):
            return F.conv3d(F.pad(x, (1,) * 6), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(4, 3, 3, padding=1), self.Same(3, 4, 3)
        self.up = nn.ConvTranspose3d(4, 2, 2, stride=2)
        self.register_buffer("kernel", torch.rand(2, 1, 3, 3, 3))

    def forward(self, x):
        return F.conv3d(self.up(self.second(self.first(x)).relu()), self.kernel, groups=2)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_model_that_calls_functions(accelerated, x):
    model = CallsFunctions()
    expected = model(x)
    if accelerated:
        pyvolconv.accelerate(model)
    with pyvolconv.patch():
        y, passes = heard(model, x)
    assert passes == ["forward"] * 3 + ["grad_input"]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_accelerated_chains_still_run_as_one_pass(x):
    model = nn.Sequential(nn.Conv3d(4, 3, 3), nn.ReLU(), nn.MaxPool3d(2))
    with pyvolconv.patch():
        pyvolconv.accelerate(model)
        with dispatch.listen() as asked:
            model(x)
    ((problem, _),) = asked
    assert problem.pool is not None


@pytest.mark.parametrize("function", [F.conv3d, F.conv_transpose3d], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((), {}),
        (("x",), {}),
        (("x", "w"), {"input": "x"}),
        (("x", "w"), {"strides": 1}),
        (("x", "w"), {"stride": 0}),
        (("x", "w"), {"stride": (1, 1)}),
        (("x", "w"), {"stride": 1.0}),
        (("x", "w"), {"padding": -1}),
        (("x", "w"), {"padding": "full"}),
        (("x", "w"), {"groups": 3}),
        (("x", "w", None, 1, 0, 1, 1, 1, 1), {}),
        (("x", "w", "x"), {}),
        (("x", "w0"), {}),
        (("x0", "w"), {}),
        (("x", None), {}),
        (("double", "w"), {}),
    ],
    ids=str,
)
def test_errors_are_those_of_torch(function, args, options, x, w):
    operands = {"x": x, "w": w, "x0": x[0, 0], "w0": w[0], "double": x.double()}

    def given(value):
        return operands.get(value, value) if isinstance(value, str) else value

    args = [given(value) for value in args]
    options = {name: given(value) for name, value in options.items()}
    expected = error_of(function, *args, **options)
    with pyvolconv.patch():
        assert error_of(function, *args, **options) == expected


def test_what_no_backend_takes_is_left_to_torch_and_does_not_come_back(x, w):
    expected = F.conv3d(x.to_mkldnn(), w).to_dense()
    with pyvolconv.patch(), pyvolconv.patch():
        y, passes = heard(F.conv3d, x.to_mkldnn(), w)
    assert passes == []
    assert torch.equal(y.to_dense(), expected)


def test_a_forced_backend_that_cannot_is_an_error(x, w):
    with pyvolconv.patch(), pyvolconv.use_backend("cpp"), pytest.raises(UnsupportedProblemError, match="forward of"):
        F.conv3d(x.to(torch.int16), w.to(torch.int16))


def test_blocks_nest_and_end(x, w):
    block = pyvolconv.patch()
    with block:
        with block, pyvolconv.patch():
            assert is_patched(x, w)
        assert is_patched(x, w)
    assert not is_patched(x, w)
    with pytest.raises(KeyError), block:
        raise KeyError
    assert not is_patched(x, w)
    with pytest.raises(RuntimeError, match="to have 4 channels"), block:
        F.conv3d(x[:, 1:], w)
    assert not is_patched(x, w)


def test_as_a_decorator(x, w):
    @pyvolconv.patch()
    def inner(x, deep):
        """What it does."""
        return is_patched(x, w) and (not deep or inner(x, deep - 1))

    assert inner.__doc__ == "What it does."
    assert inner(x, 3)
    assert not is_patched(x, w)


def test_a_decorator_without_its_parentheses():
    with pytest.raises(TypeError, match=r"write @pyvolconv.patch\(\) above it"):
        pyvolconv.patch(lambda: None)


def test_blocks_are_of_one_thread(x, w):
    inside, outside = threading.Event(), threading.Event()
    seen = []

    def other():
        with pyvolconv.patch():
            inside.set()
            outside.wait(60)
            seen.append(is_patched(x, w))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    seen.append(is_patched(x, w))
    with pyvolconv.patch():
        fresh = threading.Thread(target=lambda: seen.append(is_patched(x, w)))
        fresh.start()
        fresh.join()
    outside.set()
    thread.join()
    assert seen == [False, False, True]
