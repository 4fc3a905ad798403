"""Which paths of the CNN a comparison times, in the order of its report, each in the layouts that it runs in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..dispatch import backends
from ..precision import use_tf32
from ..problem import Layout
from .paths import Need, fuses
from .steps import TORCH_PATHS, PathSpec


def lineup(chosen: Mapping[str, Sequence[Layout]], needs: Sequence[Need], device: str) -> list[list[PathSpec]]:
    """Torch's paths, then ours: dense, fused with a dense backward, fused.

    On a GPU torch's and those of ours that can round float32 to TF32 come with and without, the fastest of each side as
    a CUDA graph, too.

    Args:
        chosen: families or names of ours, each with the layouts that it runs in.
        needs: what the network runs.
        device: "cpu" or "cuda".
    """
    peers = [[PathSpec(path, "cnn", None, layout)] for path, layout in TORCH_PATHS.items()]
    if device == "cuda":
        peers = [
            *(_with(specs, tf32=True) for specs in peers),
            *(_with(specs, tf32=False) for specs in peers),
            *(_with(specs, tf32=True, graph=True) for specs in peers),
        ]
    return [*peers, *(specs for name, layouts in chosen.items() for specs in _ours(name, layouts, needs, device))]


def _ours(name: str, layouts: Sequence[Layout], needs: Sequence[Need], device: str) -> list[list[PathSpec]]:
    direct = [PathSpec(name, "cnn", name, layout) for layout in layouts]
    fused: list[PathSpec] = []
    # The readable reference is too slow to be worth more rows.
    if all(backend.automatic for backend in backends() if name in (backend.name, backend.family)):
        fused = [
            PathSpec(f"{name} fused", "cnn", name, layout, True) for layout in layouts if fuses(name, needs, layout)
        ]
    dense = [replace(spec, path=f"{name} fused, dense backward", dense_backward=True) for spec in fused]
    if device == "cuda" and _rounds_to_tf32(name, needs):
        direct, dense, fused = (_with(specs, tf32=True) for specs in (direct, dense, fused))
        unrounded = [_with(specs, tf32=False) for specs in (direct, fused)]
    else:
        unrounded = []
    graphed = [_with(fused or direct, graph=True)] if device == "cuda" else []
    return [specs for specs in (direct, dense, fused, *unrounded, *graphed) if specs]


def _with(specs: Sequence[PathSpec], *, tf32: bool | None = None, graph: bool = False) -> list[PathSpec]:
    """The same paths with a switch set, and with a name that says so where it is not torch's default."""
    suffix = (", tf32 off" if tf32 is False else "") + (", graph" if graph else "")
    return [
        replace(spec, path=spec.path + suffix, tf32=spec.tf32 if tf32 is None else tf32, graph=graph) for spec in specs
    ]


def _rounds_to_tf32(name: str, needs: Sequence[Need]) -> bool:
    """Whether members of a family or a backend promise less where torch's switch lets them round to TF32."""
    members = [backend for backend in backends() if name in (backend.name, backend.family)]
    promises = []
    for allowed in (True, False):
        with use_tf32(allowed):
            promises.append([member.accuracy(problem, pass_) for member in members for problem, pass_ in needs])
    return promises[0] != promises[1]
