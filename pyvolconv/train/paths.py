"""Which hand-written paths can run a network's convolutions here, in which layout, and why the others cannot."""

from __future__ import annotations

from collections.abc import Sequence

from ..dispatch import backends
from ..epilogue import MaxPool
from ..problem import LAYOUTS, ConvProblem, Layout, Pass

Need = tuple[ConvProblem, Pass]


def our_paths(asked: Sequence[str] | None, needs: Sequence[Need]) -> tuple[dict[str, list[Layout]], dict[str, str]]:
    """Families of hand-written backends that can run some passes of some convolutions, and why the others cannot.

    Args:
        asked: families or names; None for every family of this package.
        needs: what the network runs; the layout of these problems is replaced by each layout in turn.

    Returns:
        (able, refused): family to the layouts in which it runs everything, and family to the first reason why not.

    Raises:
        ValueError: a name is not one of this package's backends.
    """
    ours = [backend for backend in backends() if backend.ours]
    able: dict[str, list[Layout]] = {}
    refused = {}
    for name in dict.fromkeys(asked if asked is not None else [backend.family for backend in ours]):
        if not any(name in (backend.name, backend.family) for backend in ours):
            known = ", ".join(dict.fromkeys(part for backend in ours for part in (backend.family, backend.name)))
            raise ValueError(f"--backends: {name!r} is no hand-written path; expected some of: {known}")
        reasons = {layout: _first_reason(name, needs, layout) for layout in LAYOUTS}
        layouts = [layout for layout in LAYOUTS if not reasons[layout]]
        if layouts:
            able[name] = layouts
        else:
            refused[name] = reasons[LAYOUTS[0]]
    return able, refused


def fuses(name: str, needs: Sequence[Need], layout: Layout) -> bool:
    """Whether a family or backend has every pass also as one with ReLU and a 2x2x2 max-pool behind it."""
    pool = MaxPool((2, 2, 2), (2, 2, 2), ceil_mode=True)
    members = [member for member in backends() if name in (member.name, member.family) and member.has_max_pool]
    return bool(members) and all(
        any(not member.unsupported_reasons(_pooled(problem, layout, pool), pass_) for member in members)
        for problem, pass_ in needs
    )


def _pooled(problem: ConvProblem, layout: Layout, pool: MaxPool) -> ConvProblem:
    return problem.with_(layout=layout, activation="relu", pool=pool)


def _first_reason(family: str, needs: Sequence[Need], layout: Layout) -> str:
    """Why no member of a family runs some pass of some convolution; "" when every pass has a member that runs it."""
    members = [backend for backend in backends() if family in (backend.name, backend.family)]
    for problem, pass_ in needs:
        reasons = [member.unsupported_reasons(problem.with_(layout=layout), pass_) for member in members]
        if all(reasons):
            return reasons[0][0]
    return ""
