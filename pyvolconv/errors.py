"""Errors that are this package's own; wrong arguments raise what torch raises."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .problem import ConvProblem, Pass


class _PassError(RuntimeError):
    """What goes wrong with one pass of one problem."""

    def __init__(self, problem: ConvProblem, pass_: Pass, lines: Sequence[str]) -> None:
        self.problem = problem
        self.pass_ = pass_
        super().__init__("\n".join((f"{pass_} of {problem}: {lines[0]}", *lines[1:])))

    def __reduce__(self) -> Any:
        # Exceptions are made anew by calling their class with the message, which takes more here. Process pools hang
        # when that fails.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class UnsupportedProblemError(_PassError):
    """No allowed backend can run a pass of a problem.

    Attributes:
        problem: the convolution that was asked for.
        pass_: "forward", "grad_input" or "grad_weight".
        reasons: backend name -> every reason why that backend cannot run it.
        able: names of the backends that could run it if they were allowed to.
    """

    def __init__(
        self,
        problem: ConvProblem,
        pass_: Pass,
        reasons: Mapping[str, list[str]],
        forced: str | None,
        able: Sequence[str],
    ) -> None:
        self.reasons = dict(reasons)
        self.able = tuple(able)
        asked = f"backend {forced!r} was forced, but" if forced else "no backend was forced, and"
        lines = [f"{asked} none of these can run it:"]
        lines += [f"  {name}: {reason}" for name, several in self.reasons.items() for reason in several]
        if able:
            lines.append(
                f"{'Leave the backend unforced, or name' if forced else 'Name'} one that can, by use_backend or "
                f"PYVOLCONV_BACKEND: {', '.join(able)}"
            )
        else:
            lines.append("No other backend can run it here either; `pyvolconv info` says what each of them runs.")
        super().__init__(problem, pass_, lines)


class BackendError(_PassError):
    """A backend raised an exception in the middle of a pass; that exception is the `__cause__`.

    The pass has no result: weights, gradients and buffers are as before it.

    Attributes:
        problem: the convolution that was asked for.
        pass_: "forward", "grad_input" or "grad_weight".
        backend: name of the backend that failed.
        able: names of the other backends that could run it.

    Example:
        >>> import pyvolconv
        >>> problem = pyvolconv.ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i4x4x4-k3")
        >>> print(pyvolconv.BackendError(problem, "forward", "cpp.direct", ValueError("too hot"), ["aten"]))
        forward of cpu-float32-ncdhw-n1ic2oc3-i4x4x4-k3: backend 'cpp.direct' failed with ValueError: too hot
        Others that can run it, to be named by use_backend or PYVOLCONV_BACKEND: aten
    """

    def __init__(self, problem: ConvProblem, pass_: Pass, backend: str, reason: Exception, able: Sequence[str]) -> None:
        self.backend = backend
        self.able = tuple(able)
        lines = [f"backend {backend!r} failed with {type(reason).__name__}: {reason}", *self._advice(reason)]
        if able:
            lines.append(f"Others that can run it, to be named by use_backend or PYVOLCONV_BACKEND: {', '.join(able)}")
        super().__init__(problem, pass_, lines)

    def _advice(self, reason: Exception) -> Sequence[str]:
        return ()


class BackendMemoryError(BackendError, torch.OutOfMemoryError, MemoryError):
    """A backend did not get the memory that a pass takes.

    Whoever catches one of the errors by which Python and torch say so, and goes on with a smaller batch, catches this.
    """

    def _advice(self, reason: Exception) -> Sequence[str]:
        if isinstance(reason, torch.OutOfMemoryError):
            return ()
        # Programs that look for the largest batch know torch's words for the memory of the CPU.
        return ("In torch's words, DefaultCPUAllocator: can't allocate memory. A smaller batch takes less.",)


def failure(problem: ConvProblem, pass_: Pass, backend: str, reason: Exception, able: Sequence[str]) -> BackendError:
    """The error to raise where a backend raised `reason`."""
    out_of_memory = isinstance(reason, MemoryError | torch.OutOfMemoryError)
    return (BackendMemoryError if out_of_memory else BackendError)(problem, pass_, backend, reason, able)
