"""Which backend runs a pass of a problem: forced > tuned > cost model > a clear error.

A backend is forced by `use_backend("cpp")` in a `with` block or by the environment variable
PYVOLCONV_BACKEND; the innermost wins. Among those that are allowed and can run the problem, the one that was
measured to be fastest is taken where times are known (`tuned`, filled by `autotune`). Otherwise the cost model takes
the one which expects to reach the largest share of the machine's FMA peak (`Backend.expected_efficiency`): all of them
do the same multiplications, so that is the least time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from math import prod
from typing import Any, TypeVar

import torch

from .backends.base import Backend
from .backends.pooling_time import pooling_time
from .backends.registry import REGISTRY, select
from .errors import UnsupportedProblemError, failure
from .precision import (
    Precision,
    convolves_float32_in_bfloat16,
    cuda_switches,
    multiplies_float32_in_bfloat16,
    store_precision,
)
from .problem import ConvProblem, Pass
from .tuned import milliseconds, winner_of

ENVIRONMENT_VARIABLE = "PYVOLCONV_BACKEND"

Result = TypeVar("Result")

logger = logging.getLogger("pyvolconv")
_forced: ContextVar[str | None] = ContextVar("pyvolconv_forced_backend", default=None)
_listeners: list[set[tuple[ConvProblem, Pass]]] = []


def backends() -> tuple[Backend, ...]:
    """Every backend in order of preference; ask one with `unsupported_reasons(problem, pass_)`.

    Example:
        >>> import pyvolconv
        >>> [backend.name for backend in pyvolconv.backends() if not backend.ours]
        ['aten']
    """
    return REGISTRY


def forced_backend() -> str | None:
    """The name or family that this thread is forced to, or None."""
    return _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE) or None


@contextmanager
def use_backend(name_or_family: str) -> Iterator[None]:
    """Force every convolution of this thread inside the block onto one backend or family.

    A gradient keeps the backend that its forward call was forced to, also when `backward()` runs after the
    block. A forced backend that cannot run a problem raises; it never falls back.

    Raises:
        ValueError: no backend has that name or family.
        UnsupportedProblemError: (from the convolution) with the problem, the pass and every reason.

    Example:
        >>> import torch, pyvolconv
        >>> x, w = torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3)
        >>> with pyvolconv.use_backend("numba"):
        ...     y = pyvolconv.conv3d(x, w)
        >>> y.shape, y.unique().item()
        (torch.Size([1, 3, 2, 2, 2]), 54.0)
    """
    select(name_or_family)
    token = _forced.set(name_or_family)
    try:
        yield
    finally:
        _forced.reset(token)


def use_backend_of_forward(name_or_family: str | None) -> AbstractContextManager[None]:
    """Force what the forward call was forced to, unless a `use_backend` block says otherwise now."""
    if name_or_family is None or _forced.get() is not None:
        return nullcontext()
    return use_backend(name_or_family)


def choose(problem: ConvProblem, pass_: Pass) -> Backend:
    """The backend that runs `pass_` of `problem` when called from here.

    Raises:
        UnsupportedProblemError: no allowed backend can run it.
        ValueError: PYVOLCONV_BACKEND names no backend, or PYVOLCONV_ISA no instruction set.
    """
    backend = choose_or_none(problem, pass_)
    if backend is None:
        forced = forced_backend()
        able = [name for name, reasons in _reasons(REGISTRY, problem, pass_).items() if not reasons]
        raise UnsupportedProblemError(problem, pass_, _reasons(_candidates(forced), problem, pass_), forced, able)
    return backend


def choose_or_none(problem: ConvProblem, pass_: Pass) -> Backend | None:
    """As `choose`, and None where no allowed backend can run the pass.

    Of a problem with a pool also where putting the pass together from plain passes was measured to be as fast.
    """
    for asked in _listeners:
        asked.add((problem, pass_))
    try:
        return _choose(problem, pass_, forced_backend(), torch.get_num_threads(), _switches(problem))
    except _NobodyAbleError:
        return None


def choose_fused_or_none(problem: ConvProblem, keeps_choices: bool) -> Backend | None:
    """As `choose_or_none` for the forward pass of a problem with a pool, and None also where no times are known and
    another algorithm without a pool, then torch's pooling, is expected to be faster.

    Args:
        problem: with a pool.
        keeps_choices: whether the code of chosen voxels is asked for, for a backward pass.
    """
    backend = choose_or_none(problem, "forward")
    modelled = problem.device == "cpu" and problem.dtype == "float32" and not milliseconds(problem, "forward")
    if backend is None or forced_backend() or not modelled:
        return backend
    apart = _is_faster_apart(problem, keeps_choices, backend, torch.get_num_threads(), _switches(problem))
    return None if apart else backend


def run(method: Callable[..., Result], problem: ConvProblem, pass_: Pass, *operands: Any) -> Result:
    """What a backend's `method(problem, *operands)` returns, which is a pass of the problem.

    Raises:
        BackendError: a backend of ours raised an exception, which is the cause of this one.
        Exception: what torch raises stays what it is. It gets a note that says where that was (from Python 3.11 on).
    """
    try:
        return method(problem, *operands)
    except Exception as reason:
        backend: Backend = method.__self__  # type: ignore[attr-defined]
        if not backend.ours:
            if hasattr(reason, "add_note"):
                reason.add_note(f"{pass_} of {problem}: backend {backend.name!r}")
            raise
        reasons = _reasons(REGISTRY, problem, pass_)
        able = [other for other, refused in reasons.items() if other != backend.name and not refused]
        raise failure(problem, pass_, backend.label, reason, able) from reason


@contextmanager
def listen() -> Iterator[set[tuple[ConvProblem, Pass]]]:
    """Every problem and pass that any thread asks the dispatcher for inside the block."""
    asked: set[tuple[ConvProblem, Pass]] = set()
    _listeners.append(asked)
    try:
        yield asked
    finally:
        # By identity: sets with equal contents are equal.
        _listeners[:] = [listener for listener in _listeners if listener is not asked]


def able_backends(problem: ConvProblem, pass_: Pass) -> list[Backend]:
    """The backends that may be chosen for a pass without being named."""
    reasons = _reasons(_candidates(None), problem, pass_)
    return [backend for backend in _candidates(None) if not reasons[backend.name]]


def expected_fastest(problem: ConvProblem, pass_: Pass, able: Sequence[Backend]) -> Backend:
    """What the cost model takes among backends that can run the pass; any of them where there is nothing to compute."""
    if _is_empty(problem):
        return able[0]
    return max(able, key=lambda candidate: candidate.expected_efficiency(problem, pass_))


def fastest(problem: ConvProblem, pass_: Pass, able: Sequence[Backend]) -> Backend:
    """The one of several backends that was measured to be fastest, in its configuration; where none was, as expected.

    Args:
        problem, pass_: what is to run.
        able: one or more backends that can.
    """
    measured = _measured_fastest(problem, pass_, able)
    return expected_fastest(problem, pass_, able) if measured is None else measured


def forget_choices() -> None:
    """Choose anew from the next call on, after something that backends look at (the environment) changed."""
    _choose.cache_clear()
    _is_faster_apart.cache_clear()


def set_precision(precision: Precision) -> None:
    """Choose between the usual rounding error and more speed, for the whole process.

    As with `torch.set_float32_matmul_precision`, the name says how far one goes for speed: "default" keeps errors of
    the order of a plain sum's, "high" accepts algorithms that round more.

    Raises:
        ValueError: `precision` is neither "default" nor "high".

    Example:
        >>> import pyvolconv
        >>> pyvolconv.set_precision("high")
        >>> pyvolconv.get_precision()
        'high'
        >>> pyvolconv.set_precision("default")
    """
    store_precision(precision)
    forget_choices()


def _candidates(forced: str | None) -> tuple[Backend, ...]:
    if not forced:
        return tuple(backend for backend in REGISTRY if backend.automatic)
    try:
        return select(forced)
    except ValueError as error:
        # `use_backend` refuses wrong names itself.
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced}: {error}") from None


def _reasons(candidates: Iterable[Backend], problem: ConvProblem, pass_: Pass) -> dict[str, list[str]]:
    """Backend name -> why it cannot run the pass, empty where it can."""
    return {
        backend.name: backend.unsupported_reasons(problem, pass_)
        if problem.pool is None or backend.has_max_pool
        else ["has no pass fused with a pool"]
        for backend in candidates
    }


def _refusals(reasons: dict[str, list[str]]) -> str:
    """The first reason of each backend, once for all backends that have the same."""
    names: dict[str, list[str]] = {}
    for name, several in reasons.items():
        if several:
            names.setdefault(several[0], []).append(name)
    return "; ".join(f"{', '.join(who)}: {reason}" for reason, who in names.items())


class _NobodyAbleError(Exception):
    """No allowed backend can run a pass."""


@lru_cache(maxsize=4096)
def _choose(
    problem: ConvProblem, pass_: Pass, forced: str | None, threads: int, switches: tuple[object, ...]
) -> Backend | None:
    # `threads` and `switches` are part of the key only: of measured times, and of what backends are able to and expect.
    candidates = _candidates(forced)
    reasons = _reasons(candidates, problem, pass_)
    able = [backend for backend in candidates if not reasons[backend.name]]
    if not able and problem.pool is None:
        # Not remembered, as a result would be: what refuses may be the environment, and that may change.
        raise _NobodyAbleError
    if not able:
        return None
    measured = _measured_fastest(problem, pass_, able)
    if measured is not None and not forced and problem.pool is not None:
        times = milliseconds(problem, pass_)
        if winner_of({label: times[label] for label in (measured.label, "aten") if label in times}) == "aten":
            return None
    backend = expected_fastest(problem, pass_, able) if measured is None else measured
    if not forced and not backend.ours:
        ours = ", ".join(one.name for one in able if one.ours)
        why = f"expected to be faster than {ours}" if ours else _refusals(reasons)
        why = "measured to be as fast or faster" if measured is not None else why
        logger.warning("%s of %s runs in ATen (%s)", pass_, problem, why)
    return backend


@lru_cache(maxsize=4096)
def _is_faster_apart(
    problem: ConvProblem, keeps_choices: bool, fused: Backend, threads: int, switches: tuple[object, ...]
) -> bool:
    plain = problem.without_epilogue()
    able = able_backends(plain, "forward")
    if not able or _is_empty(problem):
        return False
    flops = problem.flops("forward")
    convolution = fastest(plain, "forward", able)
    apart = flops / convolution.expected_efficiency(plain, "forward") + pooling_time(problem, keeps_choices)
    return apart < flops / fused.expected_efficiency(problem, "forward")


def _is_empty(problem: ConvProblem) -> bool:
    return not (prod(problem.input_shape) and prod(problem.weight_shape) and prod(problem.output_shape))


def _switches(problem: ConvProblem) -> tuple[object, ...]:
    """What of the process's state changes what backends are able to, or expect."""
    if problem.device == "cuda":
        return cuda_switches()
    return convolves_float32_in_bfloat16(), multiplies_float32_in_bfloat16()


def _measured_fastest(problem: ConvProblem, pass_: Pass, able: Sequence[Backend]) -> Backend | None:
    """By the times that are known; None where there are none of these backends and of configurations that they have."""
    times = milliseconds(problem, pass_)
    timed = [backend for backend in able if backend.name in times]
    if any("@" in label for label in times):
        timed += [
            backend.configured(configuration)
            for backend in able
            for configuration in backend.configurations(problem, pass_)
            if f"{backend.name}@{configuration}" in times
        ]
    by_label = {candidate.label: candidate for candidate in timed}
    return by_label[winner_of({label: times[label] for label in by_label})] if timed else None
