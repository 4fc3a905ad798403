"""The Numba reference among threads and processes: torch's thread count, concurrent callers, forked children."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyvolconv.backends.numba import NumbaBackend
from pyvolconv.kernels import reference as loops
from pyvolconv.problem import ConvProblem

numba = pytest.importorskip("numba")

BACKEND = NumbaBackend()
PROBLEM = ConvProblem.parse("cpu-float32-ncdhw-n2ic3oc4-i5x6x7-k3-s2x1x1-p1-bias")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: thread pools and forks are properties of a whole process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_runs_on_torchs_number_of_threads(monkeypatch, threads, operands, run_pass):
    seen = []
    compiled = loops.compiled

    def spy(pass_, parallel):
        run = compiled(pass_, parallel)

        def counted(*arguments):
            seen.append((parallel, numba.get_num_threads()))
            run(*arguments)

        return counted

    monkeypatch.setattr(loops, "compiled", spy)
    available = numba.config.NUMBA_NUM_THREADS
    before = numba.get_num_threads()
    args = operands(PROBLEM, "forward")
    for count in (1, 2, available + 5):
        threads(count)
        run_pass(BACKEND, PROBLEM, "forward", args)
        assert seen[-1] == (True, min(count, available))
        assert torch.get_num_threads() == count, "Numba's pool changed torch's"
        assert numba.get_num_threads() == before, "the caller's own Numba setting was changed"


def test_two_python_threads_at_once(operands, run_pass, pass_):
    """Numba's workqueue layer would end the process (SIGABRT) if two parallel regions met."""
    args = operands(PROBLEM, pass_)
    alone = run_pass(BACKEND, PROBLEM, pass_, args)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: run_pass(BACKEND, PROBLEM, pass_, args), range(40)))
    assert all(torch.equal(alone, result) for result in together)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_two_python_threads_at_once_on_each_layer(layer):
    result = run_python(
        """
        from concurrent.futures import ThreadPoolExecutor
        import numba, torch, pyvolconv
        x, w = torch.randn(4, 4, 8, 8, 8), torch.randn(8, 4, 3, 3, 3)
        with pyvolconv.use_backend("numba"):
            alone = pyvolconv.conv3d(x, w)
        def call(_):
            with pyvolconv.use_backend("numba"):
                return torch.equal(alone, pyvolconv.conv3d(x, w))
        with ThreadPoolExecutor(4) as pool:
            print(numba.threading_layer(), all(pool.map(call, range(100))))
        """,
        NUMBA_THREADING_LAYER=layer,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [layer, "True"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_forked_child_computes_the_same_bits(layer):
    """The pool's threads do not exist in the child: without care it hangs or is ended by a signal."""
    result = run_python(
        """
        import os, signal, torch, pyvolconv
        x, w = torch.randn(2, 3, 6, 6, 6), torch.randn(4, 3, 3, 3, 3)
        def run():
            with pyvolconv.use_backend("numba"):
                return pyvolconv.conv3d(x, w)
        in_parent = run()
        child = os.fork()
        if child == 0:
            signal.alarm(200)
            os._exit(0 if torch.equal(run(), in_parent) else 3)
        _, status = os.waitpid(child, 0)
        print("child", status, "parent again", torch.equal(run(), in_parent))
        """,
        NUMBA_THREADING_LAYER=layer,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["child", "0", "parent", "again", "True"]


def test_serial_code_is_never_read_from_the_parallel_codes_file():
    assert type(loops.compiled("forward", parallel=True)._cache).__name__ == "FunctionCache"
    assert type(loops.compiled("forward", parallel=False)._cache).__name__ == "NullCache"


@pytest.mark.slow
def test_runs_where_no_cache_can_be_written():
    """A read-only installation of a user without a home: Numba then refuses `cache=True`."""
    result = run_python(
        """
        from numba.core import caching
        implementation = getattr(caching, "CacheImpl", None) or caching._CacheImpl  # Numba < 0.62
        implementation._locator_classes = []
        import torch, pyvolconv
        with pyvolconv.use_backend("numba"):
            y = pyvolconv.conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3))
        print(y.unique().tolist())
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[54.0]"


def test_says_what_it_cannot_run():
    for pass_ in ("forward", "grad_input", "grad_weight"):
        assert BACKEND.unsupported_reasons(PROBLEM, pass_) == []
        assert BACKEND.unsupported_reasons(PROBLEM.with_(dtype="float16"), pass_) == [
            "computes in float32 or float64, not in float16"
        ]
        assert BACKEND.unsupported_reasons(PROBLEM.with_(device="cuda"), pass_) == ["runs on cpu tensors, not on cuda"]


def test_runs_only_when_named():
    assert not BACKEND.automatic
