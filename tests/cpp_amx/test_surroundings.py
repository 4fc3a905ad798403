"""`cpp.amx` among others: the choice of a backend, torch's own use of the unit, threads, fork and operators."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyvolconv
from pyvolconv.dispatch import choose, forget_choices
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

from ..closeness import assert_close
from .units import WITH


def test_says_why_it_cannot_run(own, use_isa):
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic16oc16-i8-k3-p1")
    assert own.unsupported_reasons(problem, "forward") == []
    for other, why in (
        (problem.with_(dtype="float64"), "dtype is float64"),
        (problem.with_(groups=2), "2 groups"),
        (problem.with_(device="cuda"), "device is cuda"),
    ):
        (reason,) = own.unsupported_reasons(other, "forward")
        assert why in reason
    for isa in ("avx2", "baseline"):  # what PYVOLCONV_ISA caps
        use_isa(isa)
        forget_choices()
        (reason,) = own.unsupported_reasons(problem, "forward")
        assert f"instruction set {isa}" in reason
        assert "AMX" in reason
        assert choose(problem, "forward").name != own.name
        with pytest.raises(ValueError, match="AVX-512"):
            own.forward(problem, torch.ones(problem.input_shape), torch.ones(problem.weight_shape), None)


def test_choice_depends_on_settings_alone(own, split_into):
    """Not on what ran before, on the thread that asks, or on torch's modes; a setting counts from the next call on."""
    problems = [
        ConvProblem.parse(f"cpu-float32-{layout}-{text}")
        for layout in LAYOUTS
        for text in ("n2ic64oc64-i16-k3-p1", "n1ic16oc32-i24-k3-p1", "n4ic512oc512-i7-k1", "n1ic1oc8-i12-k5")
    ]

    def chosen():
        return [choose(problem, pass_).name for problem in problems for pass_ in PASSES]

    found = {}
    for count in (3, 2, 1, 3, 1, 2, 3):
        split_into(count)
        names = chosen()
        assert found.setdefault(count, names) == names
        forget_choices()
        assert chosen() == names
        own.forward(problems[1], torch.randn(problems[1].input_shape), torch.randn(problems[1].weight_shape), None)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert chosen() == names
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(chosen).result() == names
    assert own.name in found[3]


TORCH = {
    "convolution": lambda: torch.nn.functional.conv3d(
        torch.linspace(-1, 1, 2 * 64 * 6**3).bfloat16().view(2, 64, 6, 6, 6),
        torch.linspace(-1, 1, 48 * 64 * 27).bfloat16().view(48, 64, 3, 3, 3),
    ),
    "product": lambda: (
        torch.linspace(-1, 1, 96 * 200).bfloat16().view(96, 200)
        @ torch.linspace(-1, 1, 200 * 80).bfloat16().view(200, 80)
    ),
    "odd product": lambda: (
        torch.linspace(-1, 1, 5 * 70).bfloat16().view(5, 70) @ torch.linspace(-1, 1, 70 * 19).bfloat16().view(70, 19)
    ),
}


TILES = """
#include <stdint.h>
#include <string.h>
typedef struct { uint8_t bytes[64]; } Configuration;
static uint8_t values[1024];
void configure(int rows) {
    Configuration wanted = {{1}};
    wanted.bytes[16] = 64;
    wanted.bytes[48] = (uint8_t)rows;
    __asm__ volatile("ldtilecfg %0" : : "m"(wanted));
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(values), "r"((int64_t)64) : "memory");
}
void release(void) { __asm__ volatile("tilerelease"); }
int configured_rows(void) {
    Configuration found;
    memset(&found, 0, sizeof(found));
    __asm__ volatile("sttilecfg %0" : "=m"(found));
    return found.bytes[0] == 0 ? 0 : found.bytes[48];
}
"""
"""What a library does that uses the unit, and remembers how it configured the tiles of a thread."""


def test_tiles_are_left_as_they_were(own, each_pass, operands, run_pass, threads, tmp_path):
    """oneDNN's convolutions and products release theirs at the end; others may not."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile a user of the unit with")
    source, library = tmp_path / "tiles.c", tmp_path / "tiles.so"
    source.write_text(TILES)
    built = subprocess.run(["gcc", "-O1", "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    tiles = ctypes.CDLL(str(library))
    threads(1)
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic20oc40-i4x5x6-k3-p1")
    args = operands(problem, each_pass)
    tiles.release()
    expected = run_pass(own, problem, each_pass, args)
    assert tiles.configured_rows() == 0, "a thread that used no tiles has some"
    tiles.configure(5)
    try:
        assert tiles.configured_rows() == 5
        assert torch.equal(run_pass(own, problem, each_pass, args), expected)
        assert tiles.configured_rows() == 5, "other tiles than before"
    finally:
        tiles.release()


@pytest.mark.parametrize("count", [1, 2])
def test_kernels_of_torch_that_use_the_unit_stay_right(count, own, each_pass, operands, run_pass, threads):
    """Tiles are state of a thread, of which oneDNN keeps account: ours before, between and after its kernels."""
    threads(count)
    problem = ConvProblem.parse("cpu-float32-ndhwc-n2ic40oc50-i6x7x8-k3-p1")
    args = operands(problem, each_pass)
    with ThreadPoolExecutor(1) as pool:  # a thread in which neither ran before
        ours = pool.submit(run_pass, own, problem, each_pass, args).result()
    theirs = {name: run() for name, run in TORCH.items()}

    def alternate():
        for first in TORCH:
            for second in TORCH:
                for name in (first, second):
                    assert torch.equal(TORCH[name](), theirs[name]), f"{name} after cpp.amx"
                    assert torch.equal(run_pass(own, problem, each_pass, args), ours), f"cpp.amx after {name}"
                    assert torch.equal(TORCH[name](), theirs[name]), f"{name} after cpp.amx"

    alternate()
    threads_at_once = 3
    with ThreadPoolExecutor(threads_at_once) as pool:
        for done in [pool.submit(alternate) for _ in range(threads_at_once)]:
            done.result()


def test_several_python_threads_at_once(own, operands, run_pass, threads):
    threads(2)
    texts = ("n2ic16oc24-i6x9x10-k3-p1", "n2ic6oc10-i8x9x11-k3-s2-p1")
    cases = []
    for text in texts:
        for layout in LAYOUTS:
            problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
            cases += [(problem, pass_, operands(problem, pass_)) for pass_ in WITH]
    alone = [run_pass(own, *case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for expected, several in zip(
            alone, pool.map(lambda case: [run_pass(own, *case) for _ in range(8)], cases), strict=True
        ):
            assert all(torch.equal(got, expected) for got in several)


FORK = """
    import os, signal, sys
    import torch
    from pyvolconv.backends.cpp_amx import CppAmx
    from pyvolconv.problem import ConvProblem

    problem = ConvProblem.parse("cpu-float32-ndhwc-n2ic16oc24-i6x7x12-k3-p1")
    x = torch.randn(problem.input_shape).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(problem.weight_shape).contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn(problem.output_shape).contiguous(memory_format=torch.channels_last_3d)
    run = {
        "forward": lambda backend: backend.forward(problem, x, weight, None),
        "grad_input": lambda backend: backend.grad_input(problem, grad, weight),
        "grad_weight": lambda backend: backend.grad_weight(problem, grad, x),
    }

    def passes():
        return [run[name](CppAmx()) for name in sys.argv[1:]]

    torch.set_num_threads(2)
    before = passes()
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # Ends a child that hangs, which the time limit of its parent would leave behind.
        status = 1
        try:
            same = [a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(before, passes())]
            status = 0 if all(same) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), all(torch.equal(a, b) for a, b in zip(before, passes())))
"""


def test_forked_child_computes_the_same_bits(own):
    command = [sys.executable, "-c", textwrap.dedent(FORK), *WITH]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.stdout.split() == ["0", "True"], result.stderr


def test_through_the_operators(own):
    """Derivatives of both orders that need the passes it has, inference mode, autocast."""
    x, weight = torch.randn(2, 5, 4, 6, 7, requires_grad=True), torch.randn(6, 5, 3, 2, 3)
    options = (None, (2, 1, 1), (1, 0, 2))
    with pyvolconv.use_backend(own.name):
        y = pyvolconv.conv3d(x, weight, *options)
        grad = torch.randn_like(y, requires_grad=True)
        (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
        direction = torch.randn_like(first)
        (second,) = torch.autograd.grad(first, grad, direction)
        with torch.inference_mode():
            assert torch.equal(pyvolconv.conv3d(x, weight, *options), y)
            assert pyvolconv.conv3d(x[:0], weight, *options).shape == (0, *y.shape[1:])
    expected = torch.nn.functional.conv3d(x, weight, *options)
    assert_close(y, expected)
    assert_close(first, torch.autograd.grad(expected, x, grad)[0])
    assert_close(second, torch.nn.functional.conv3d(direction, weight, *options))
    with torch.autocast("cpu", torch.bfloat16):
        assert pyvolconv.conv3d(x, weight, *options).dtype == torch.bfloat16
