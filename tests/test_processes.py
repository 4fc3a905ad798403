"""Several Python threads at once, and processes made by fork: where parallel runtimes abort, hang or race."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyvolconv
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.problem import PASSES, ConvProblem

ON_EVERY_CPU = ("cpp.direct", "im2col", "numba", "aten")

# Loops of our own notice the fork. Torch's operators, which im2col is made of, hang in a forked child that still asks
# for two threads; torch's DataLoader therefore sets one in its workers.
FORKS = [("cpp.direct", 0), ("numba", 0), ("cpp.direct", 1), ("numba", 1), ("im2col", 1)]
"""Backend, and threads that the child asks for; none if 0."""

FORK = """
    import os, signal, sys
    import torch, pyvolconv

    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 10, 12, requires_grad=True)
    w = torch.randn(24, 16, 3, 3, 3, requires_grad=True)
    # Made here: any operator of torch that starts a parallel region would itself hang in the child.
    grad = torch.randn(2, 24, 8, 10, 12)

    def passes(backend):
        with pyvolconv.use_backend(backend):
            y = pyvolconv.conv3d(x, w, padding=1)
            return y.detach(), *torch.autograd.grad(y, (x, w), grad)

    torch.set_num_threads(2)
    for backend, threads_in_child in eval(sys.argv[1]):
        before = passes(backend)
        child = os.fork()
        if child == 0:
            signal.alarm(100)  # Ends a child that hangs, which the time limit of its parent would leave behind.
            status = 1
            try:
                if threads_in_child:
                    torch.set_num_threads(threads_in_child)
                same = [a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(before, passes(backend))]
                status = 0 if all(same) else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        after = passes(backend)
        undisturbed = all(torch.equal(a, b) for a, b in zip(before, after))
        print(backend, threads_in_child, os.waitstatus_to_exitcode(status), undisturbed, flush=True)
"""


def test_forked_children_compute_the_same_bits_and_leave_the_parent_alone():
    command = [sys.executable, "-c", textwrap.dedent(FORK), repr(FORKS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert result.stdout.splitlines() == [f"{name} {threads} 0 True" for name, threads in FORKS], result.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ON_EVERY_CPU)
def test_two_python_threads_at_once(name, threads):
    """Each thread has its own problem, repeats it, and must always get what it got alone."""
    threads(2)
    texts = ("n2ic16oc24-i6x9x10-k3-p1", "n2ic6oc10-i8x9x11-k3-s2-p1")
    problems = [ConvProblem.parse(f"cpu-float32-{layout}-{t}") for t in texts for layout in ("ncdhw", "ndhwc")]
    (backend,) = [b for b in pyvolconv.backends() if b.name == name]
    exact = backend.accuracy(problems[0], "forward").bitwise_reproducible

    def passes(problem, x, w):
        with pyvolconv.use_backend(name):
            y = pyvolconv.conv3d(x, w, None, problem.stride, [begin for begin, _ in problem.padding])
            return y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y))

    operands = []
    for problem in problems:
        x = torch.randn(problem.input_shape).to(memory_format=MEMORY_FORMAT[problem.layout]).requires_grad_()
        operands.append((problem, x, torch.randn(problem.weight_shape, requires_grad=True)))
    alone = [passes(*each) for each in operands]

    def repeat(which):
        return [passes(*operands[which]) for _ in range(8)]

    with ThreadPoolExecutor(len(operands)) as pool:
        for expected, several in zip(alone, pool.map(repeat, range(len(operands))), strict=True):
            assert len(several) == 8
            for got in several:
                for pass_, ours, theirs in zip(PASSES, got, expected, strict=True):
                    if exact:
                        assert torch.equal(ours, theirs), f"{pass_} changed beside another thread"
                    else:
                        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
