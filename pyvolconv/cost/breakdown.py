"""One profiled training step as rows that people read: a layer and a pass each, in the order of running."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .profiler import StepEntry, StepProfile

Pages = Literal["returned", "kept", "cached"]
"""Whether the C allocator hands freed memory back to the system ("returned", its default) or reuses it ("kept").
"cached" is a GPU's: torch's caching allocator reuses memory there, always, and there is nothing to choose."""

SMALL_SHARE = 0.002


def in_state(pages: Pages) -> str:
    """What a name or a title adds to say in which allocator state something was timed; nothing on a GPU.

    Example:
        >>> in_state("kept"), in_state("cached")
        (', pages kept', '')
    """
    return "" if pages == "cached" else f", pages {pages}"


@dataclass(frozen=True)
class PathProfile:
    """One training step of the CNN taken apart, on one path and in one allocator state."""

    path: str
    ours: bool
    pages: Pages
    batch_size: int
    profile: StepProfile

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.path + in_state(self.pages)

    def rows(self) -> list[LayerRow]:
        """One row per layer and pass, layers in the order of running, then the framework's own time by phase."""
        grouped: dict[tuple[str, str], list[StepEntry]] = {}
        for entry in self.profile.entries:
            grouped.setdefault((entry.layer, entry.pass_), []).append(entry)
        labels = _labels(self.profile.entries)
        rows = [
            LayerRow.of(labels[layer], layer, pass_, entries)
            for layer in labels
            for (owner, pass_), entries in grouped.items()
            if owner == layer
        ]
        for phase, spent in self.profile.framework_seconds.items():
            faults = self.profile.framework_faults.get(phase, 0.0)
            label = "GPU waits for the host" if self.pages == "cached" else "between operators"
            rows.append(LayerRow(label, "", "framework", phase, spent * 1e3, 0.0, 0.0, faults, None, ""))
        return rows

    def main_rows(self) -> list[LayerRow]:
        """`rows()` for people: those below `SMALL_SHARE` of the step are summed up in one last row."""
        rows = self.rows()
        limit = SMALL_SHARE * sum(row.milliseconds for row in rows)
        small = [row for row in rows if row.milliseconds < limit]
        rest = LayerRow(
            label="smaller items",
            layer="",
            kind="other",
            pass_="",
            milliseconds=sum(row.milliseconds for row in small),
            flops=sum(row.flops for row in small),
            bytes=sum(row.bytes for row in small),
            page_faults=sum(row.page_faults for row in small),
            roofline_share=None,
            backend="",
        )
        return [row for row in rows if row.milliseconds >= limit] + ([rest] if small else [])

    def to_dict(self) -> dict[str, Any]:
        """The rows of the table and the whole profile, as plain values."""
        return {
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
            "rows": [{**dataclasses.asdict(row), "gflops_per_second": row.gflops_per_second} for row in self.rows()],
            "profile": self.profile.to_dict(),
        }


@dataclass(frozen=True)
class LayerRow:
    """One pass of one layer, all its operators together.

    `flops` and `bytes` are counted, not measured; `roofline_share` is the least time that the roofline allows over the
    time taken, None where nothing was counted. `share_estimated` marks a pass that shares one operator with another.
    `label` is for people ("conv 2"), `layer` the qualified name in the network.
    """

    label: str
    layer: str
    kind: str
    pass_: str
    milliseconds: float
    flops: float
    bytes: float
    page_faults: float
    roofline_share: float | None
    backend: str
    share_estimated: bool = False

    @classmethod
    def of(cls, label: str, layer: str, pass_: str, entries: list[StepEntry]) -> LayerRow:
        """The sum of the operators of one pass of one layer."""
        took = sum(entry.seconds for entry in entries)
        least = sum(entry.least_seconds for entry in entries)
        return cls(
            label,
            layer,
            _main_kind(entries),
            pass_,
            milliseconds=took * 1e3,
            flops=sum(entry.flops for entry in entries),
            bytes=sum(entry.min_bytes for entry in entries),
            page_faults=sum(entry.page_faults for entry in entries),
            roofline_share=least / took if took > 0 and least > 0 else None,
            backend=", ".join(dict.fromkeys(entry.backend for entry in entries)),
            share_estimated=any(entry.split_estimated for entry in entries),
        )

    @property
    def gflops_per_second(self) -> float | None:
        """GF/s; None where no operation was counted."""
        return self.flops / self.milliseconds / 1e6 if self.flops and self.milliseconds > 0 else None


def _main_kind(entries: Sequence[StepEntry]) -> str:
    """What a layer is: the kind of its first operator that is more than a copy, a zero-fill or a change of shape."""
    return next((entry.kind for entry in entries if entry.kind not in ("memory", "view")), entries[0].kind)


def _labels(entries: Sequence[StepEntry]) -> dict[str, str]:
    """Layer to a name that reads well: its kind, numbered in the order of running where a kind occurs again."""
    kinds = {
        layer: _main_kind([entry for entry in entries if entry.layer == layer])
        for layer in dict.fromkeys(entry.layer for entry in entries)
    }
    labels, seen = {}, Counter[str]()
    for layer, kind in kinds.items():
        seen[kind] += 1
        repeated = sum(other == kind for other in kinds.values()) > 1
        labels[layer] = f"{kind} {seen[kind]}" if repeated else kind
    return labels
