"""Where the kernels get no scratch memory, an exception arrives, and what they keep for the next call is sound."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..harness import EXTENSION, MISSING

STATM = Path("/proc/self/statm")
pytestmark = [
    pytest.mark.skipif(EXTENSION is None, reason=MISSING),
    pytest.mark.skipif(not STATM.exists(), reason="the system does not say how much address space a process has"),
]

SCRIPT = """
    import resource, sys, threading
    import torch
    import pyvolconv
    from pyvolconv.errors import BackendMemoryError

    # Weights of 7 MB: the kernels pack them into scratch memory, or add up parts of them there, beside small tensors.
    channels = 256
    backend, number, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(number)
    x, y = torch.randn(2, channels, 2, 3, 4), torch.randn(2, channels, 2, 3, 4)
    w = torch.randn(channels, channels, 3, 3, 3)
    small = torch.randn(1, 4, 4, 4, 4), torch.randn(4, 4, 3, 3, 3)
    geometry = ((1, 1, 1), (1,) * 6, (1, 1, 1), 1)
    operators = torch.ops.pyvolconv
    passes = {
        "forward": lambda: operators.conv3d(x, w, None, *geometry),
        "grad_input": lambda: operators.conv3d_grad_input(y, w, x.shape[2:], *geometry),
        "grad_weight": lambda: operators.conv3d_grad_weight(y, x, w.shape[2:], *geometry),
        "pooled": lambda: operators.conv3d_max_pool(
            x, w, None, *geometry, "relu", 0.0, (2, 2, 2), (2, 2, 2), (0, 0, 0), True)[0],
    }

    def address_space():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

    def caught_without_memory(run, room):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, limits[1]))
        try:
            run()
        except Exception as error:
            return error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    def check(name):
        torch.set_num_threads(number)
        run, pass_ = passes[name], "forward" if name == "pooled" else name
        with pyvolconv.use_backend(backend):
            expected_small = pyvolconv.conv3d(*small)  # Starts the threads, whose stacks are address space too.
            before = x.clone(), w.clone(), y.clone()
            # Room for the result, and for less scratch memory than weights. Where glibc cannot extend its heap it
            # asks the system for a mebibyte at least, however small the result.
            error = caught_without_memory(run, (w.nbytes if name == "grad_weight" else 0) + (4 << 20))
            assert type(error) is BackendMemoryError, (name, error)
            assert type(error.__cause__) is MemoryError
            assert str(error).startswith(f"{pass_} of {error.problem}: backend '{error.backend}' failed with"), error
            assert "MemoryError: std::bad_alloc" in str(error), error
            assert all(torch.equal(a, b) for a, b in zip(before, (x, w, y)))
            assert torch.equal(pyvolconv.conv3d(*small), expected_small)
            got = run()
            assert torch.equal(got, run())
        with pyvolconv.use_backend("aten"):
            torch.testing.assert_close(got, run(), rtol=1e-3, atol=1e-2)
        print(name, flush=True)

    def check_and_stay(name):
        try:
            check(name)
        finally:
            checked.release()
            end.wait()

    # Scratch memory is of a thread. None ends before all have run: what it frees would be room for the next.
    checked, end = threading.Semaphore(0), threading.Event()
    for name in names:
        threading.Thread(target=check_and_stay, args=(name,)).start()
        checked.acquire()
    end.set()
"""


@pytest.mark.parametrize(
    ("name", "number", "passes"),
    [
        ("cpp.direct", 2, ["forward", "grad_input", "grad_weight", "pooled"]),
        ("cpp.winograd", 1, ["forward", "grad_input", "grad_weight"]),
    ],
)
def test_bad_alloc_arrives_as_an_error_of_the_pass(name, number, passes):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), name, str(number), *passes]
    # What glibc frees goes back to the system at once, and threads reserve no address space.
    glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **glibc, "PYVOLCONV_NO_CACHE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == passes, done.stderr
