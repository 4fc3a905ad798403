"""The block beside modes, classes of tensors, transforms, checkpoints and compilers of torch."""

from __future__ import annotations

import asyncio
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

from ..closeness import assert_close
from .calls import error_of, heard, is_patched


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
    assert_close(got, expected)


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
        assert_close(compiled(x, w), expected)
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
