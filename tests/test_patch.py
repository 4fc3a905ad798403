"""`with pyvolconv.patch():` computes what others call `torch.nn.functional.conv3d` for, and changes nothing else."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.errors import UnsupportedProblemError

CALLS = {
    "plain": (F.conv3d, (), {}),
    "by position": (F.conv3d, (None, 2, 1, 1, 1), {}),
    "by name": (F.conv3d, (), {"padding": "same", "dilation": (1, 2, 1), "bias": None}),
    "by the name in torch": (torch.conv3d, (), {"padding": [1, 0, 2], "groups": 1}),
    "transposed": (F.conv_transpose3d, (), {"stride": 2, "output_padding": 1}),
    "transposed by position": (torch.conv_transpose3d, (None, 2, 1, 1, 1, 1), {}),
}


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 6, 7)


@pytest.fixture
def w():
    return torch.randn(4, 4, 3, 3, 3)


def heard(function, *args, **options):
    """What a call returns, and the passes that the dispatcher was asked for meanwhile."""
    with dispatch.listen() as asked:
        result = function(*args, **options)
    return result, sorted(pass_ for _, pass_ in asked)


def is_patched(x, w):
    return heard(F.conv3d, x, w)[1] == ["forward"]


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


def error_of(function, *args, **options):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        function(*args, **options)
    return caught.type, str(caught.value)


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


class Watch(TorchFunctionMode):
    """Lists the names of torch's functions that are called in the block."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_a_generator_and_a_coroutine_are_as_in_a_mode_of_torch(x, w):
    """A block that is suspended holds for whoever runs meanwhile: torch's modes are of a thread, not of a context."""

    def suspended(block):
        with block:
            yield

    def meanwhile(block, check):
        generator = suspended(block)
        next(generator)
        during = check()
        generator.close()
        return during, check()

    async def waiting(block, check):
        event = asyncio.Event()

        async def wait():
            with block:
                await event.wait()

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        during = check()
        event.set()
        await task
        return during, check()

    watch = Watch()

    def is_watched():
        before = len(watch.seen)
        F.relu(x)
        return len(watch.seen) > before

    for block, check in ((watch, is_watched), (pyvolconv.patch(), lambda: is_patched(x, w))):
        assert meanwhile(block, check) == (True, False)
        assert asyncio.run(waiting(block, check)) == (True, False)


def test_other_modes_see_what_they_saw(x, w):
    with Watch() as outer, pyvolconv.patch(), Watch() as inner:
        assert is_patched(x, w)
    assert inner.seen == ["conv3d"]
    assert outer.seen.count("conv3d") == 1
    with pyvolconv.patch(), torch.device("meta"):
        assert torch.empty(3).is_meta
        assert is_patched(x, w)


class Mine(torch.Tensor):
    heard: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def test_classes_of_tensors_hear_of_the_function_of_torch(x, w):
    mine = x.as_subclass(Mine)
    results = []
    for block in (nullcontext(), pyvolconv.patch()):
        Mine.heard = []
        with block:
            results.append(heard(F.conv3d, mine, w, padding=1))
        assert Mine.heard == [F.conv3d]
    (expected, _), (y, passes) = results
    assert passes == ["forward"]
    assert type(y) is type(expected) is Mine
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-4)


def test_a_class_of_tensors_that_refuses(x, w):
    expected = error_of(F.conv3d, x.as_subclass(Refusing), w)
    with pyvolconv.patch():
        kind, message = error_of(F.conv3d, x.as_subclass(Refusing), w)
    assert kind is expected[0] is TypeError
    # torch lists the modes that are on beside the class.
    assert [line for line in message.splitlines() if "mode object" not in line] == expected[1].splitlines()


@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_autocast(name, x, w):
    function = getattr(F, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = function(x, w)
        with pyvolconv.patch():
            y, passes = heard(function, x, w)
    assert len(passes) == 1
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=0.3)


def test_transforms(x, w):
    def loss(x, w):
        return F.conv3d(x, w, padding=1).square().sum()

    def several():
        return (
            torch.func.grad(loss, (0, 1))(x, w),
            torch.vmap(torch.func.grad(loss, 1), (0, None))(x, w),
            torch.vmap(lambda weight: F.conv3d(x, weight))(torch.stack([w, 2 * w])),
            torch.func.jvp(loss, (x, w), (torch.ones_like(x), torch.ones_like(w))),
        )

    x, w = x.double(), w.double()
    expected = several()
    with pyvolconv.patch():
        got, passes = heard(several)
    assert passes == sorted(passes)
    assert {"forward", "grad_input", "grad_weight"} == set(passes)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("context", [nullcontext, pyvolconv.patch, Watch])
def test_what_a_checkpoint_computes_anew_is_computed_by_torch(context, use_reentrant, x, w):
    """`backward()` is a torch function itself, and torch takes a mode off while it handles one."""

    def block(x):
        modes.append(torch._C._len_torch_function_stack())
        return F.conv3d(F.conv3d(x, w, padding=1).relu(), w)

    modes = []
    w.requires_grad_()
    x.requires_grad_()
    expected = torch.autograd.grad(block(x).square().sum(), (x, w))
    with pyvolconv.patch():
        y, passes = heard(checkpoint, block, x, use_reentrant=use_reentrant)
        assert passes == ["forward", "forward"]
    with context():
        _, passes = heard(y.square().sum().backward)
    assert modes == [0, 1, 0]
    assert "forward" not in passes
    torch.testing.assert_close((x.grad, w.grad), expected, rtol=1e-3, atol=1e-1)


def test_compiled_code_in_a_block_and_blocks_in_compiled_code(x, w):
    def relu_of_conv(x, w):
        return F.relu(F.conv3d(x, w, padding=1))

    def with_block(x, w):
        with pyvolconv.patch():
            y = relu_of_conv(x, w)
        return y + F.conv3d(x, w, padding=1)

    def targets(counter):
        return [
            [str(node.target) for node in graph.graph.nodes if "conv3d" in str(node.target)] for graph in counter.graphs
        ]

    expected = relu_of_conv(x, w)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(relu_of_conv, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, w), expected)
        with pyvolconv.patch():
            y, passes = heard(compiled, x, w)
        assert passes == ["forward"]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    # Once for each side of the block, never again.
    theirs, ours = targets(counter)
    assert ours == ["pyvolconv.conv3d.default"] != theirs

    for function, number in ((with_block, 2), (pyvolconv.patch()(relu_of_conv), 1)):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(x, w), function(x, w), rtol=1e-4, atol=1e-4)
        (found,) = targets(counter)
        assert len(found) == number
        assert found.count("pyvolconv.conv3d.default") == 1


def test_graphs_hold_the_function_or_the_operator(x, w):
    class Module(nn.Module):
        def forward(self, x, w):
            return F.conv3d(x, w)

    with pyvolconv.patch():
        traced = fx.symbolic_trace(Module())
        exported = torch.export.export(Module(), (x, w))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [F.conv3d]
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.pyvolconv.conv3d.default]
    assert heard(traced, x, w)[1] == []
    with pyvolconv.patch():
        assert heard(traced, x, w)[1] == ["forward"]
