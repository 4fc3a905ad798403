"""Compile what a run needs in several processes at once, into the on-disk cache of the compiler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as NoTime
from multiprocessing import get_context

from pyvolconv.backends.base import Backend
from pyvolconv.backends.registry import select
from pyvolconv.problem import ConvProblem, Pass

Job = tuple[str, str, str, Pass]
"""Name and configuration of a backend, text of a problem, and the pass: what another process can be told."""

MOST_PROCESSES = 16
FEWEST_JOBS = 4
"""Per process: it takes seconds to start."""


def job(backend: Backend, problem: ConvProblem, pass_: Pass) -> Job:
    return backend.name, backend.configuration, str(problem), pass_


def compile_job(one: Job) -> None:
    name, configuration, text, pass_ = one
    (backend,) = (backend for backend in select(name) if backend.name == name)
    if configuration:
        backend = backend.configured(configuration)
    backend.prepare(ConvProblem.parse(text), pass_)


def compile_all(jobs: Sequence[Job], seconds: float) -> dict[Job, str]:
    """Have each compiled, within about `seconds`; what is left then is compiled at its first call.

    Returns:
        Those that failed or were left, with the reason.
    """
    processes = min(os.cpu_count() or 1, MOST_PROCESSES, -(-len(jobs) // FEWEST_JOBS))
    failed: dict[Job, str] = {}
    if not jobs:
        return failed
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    futures = {pool.submit(compile_job, one): one for one in jobs}
    try:
        for future in as_completed(futures, timeout=seconds):
            if (error := future.exception()) is not None:
                failed[futures[future]] = f"{type(error).__name__}: {error}"
    except NoTime:
        failed |= {one: "left out: no time" for future, one in futures.items() if not future.done()}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return failed
