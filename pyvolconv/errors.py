"""Errors that are this package's own; wrong arguments raise what torch raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .problem import ConvProblem, Pass


class UnsupportedProblemError(RuntimeError):
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
        self.problem = problem
        self.pass_ = pass_
        self.reasons = dict(reasons)
        self.able = tuple(able)
        asked = f"backend {forced!r} was forced, but" if forced else "no backend was forced, and"
        lines = [f"{pass_} of {problem}: {asked} none of these can run it:"]
        lines += [f"  {name}: {reason}" for name, several in self.reasons.items() for reason in several]
        if able:
            lines.append(
                f"{'Leave the backend unforced, or name' if forced else 'Name'} one that can, by use_backend or "
                f"PYVOLCONV_BACKEND: {', '.join(able)}"
            )
        else:
            lines.append("No other backend can run it here either; `pyvolconv info` says what each of them runs.")
        super().__init__("\n".join(lines))
