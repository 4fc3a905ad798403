"""From torch as installed to pyvolconv, one change at a time: the rows, in order, and what each takes away.

    torch as installed, torch's better layout | direct, + fused forward, + sparse backward, + pages kept

Beside them stand the peers at their best: torch's faster layout and the LSTM, both with pages kept. On a GPU there is
no choice of pages; the last row is the whole step as one CUDA graph, and torch's graph is a peer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .breakdown import in_state
from .results import ComparisonResult, PathTiming

PARTS = {
    "forward": "forward",
    "grad_input": "grad_input",
    "grad_weight": "grad_weight",
    "other": "everything else",
}


@dataclass(frozen=True)
class Row:
    """One training step on the way.

    Attributes:
        name: short, for a table.
        change: what this row does that the row above does not, as the subject of a sentence; "" for a peer and for the
            first row.
        meaning: what runs, in one sentence.
        timing: the step.
        before: the timing of the row above; None for a peer and for the first row.
        to_lstm: its time over the LSTM's in the same allocator state, where that was timed.
        speed_up: torch as installed over its time; None for the LSTM.
        memory_bytes: what a step of its path adds to the process at its peak, measured with pages returned.
    """

    name: str
    change: str
    meaning: str
    timing: PathTiming
    before: PathTiming | None
    to_lstm: float | None
    speed_up: float | None
    memory_bytes: int | None

    @property
    def removed(self) -> float | None:
        """Milliseconds less than in the row above; negative where the change costs time."""
        return self.before.milliseconds - self.timing.milliseconds if self.before else None

    def to_dict(self) -> dict[str, Any]:
        """Words and numbers for JSON; the step itself is named by its path and allocator state."""
        return {
            "name": self.name,
            "meaning": self.meaning,
            "path": self.timing.path,
            "pages": self.timing.pages,
            "milliseconds": self.timing.milliseconds,
            "removed": self.removed,
            "to_lstm": self.to_lstm,
            "speed_up": self.speed_up,
            "memory_bytes": self.memory_bytes,
        }


@dataclass(frozen=True)
class Removal:
    """What going from one path to the next takes away, in ms per step and part by part (negative: added)."""

    change: str
    before: PathTiming
    after: PathTiming
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, change: str, before: PathTiming, after: PathTiming) -> Removal:
        """The difference of two steps, with those parts that both have."""
        saved = {}
        for part in PARTS:
            old, new = getattr(before, part), getattr(after, part)
            if old is not None and new is not None:
                saved[part] = old - new
        return cls(change, before, after, saved)

    @property
    def milliseconds(self) -> float:
        """The whole saving of a step."""
        return self.before.milliseconds - self.after.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """The change and what it takes away, as plain values for JSON."""
        return {"change": self.change, "milliseconds": self.milliseconds, "parts": self.parts}


def as_installed(result: ComparisonResult) -> PathTiming | None:
    """torch as its users have it: contiguous tensors, the allocator untouched, on a GPU TF32 allowed."""
    return result.timing("torch contiguous", result.before)


def rows_of_removal(result: ComparisonResult) -> list[Row]:
    """The rows in order, as far as their steps were timed; empty until torch and one of our paths were."""
    installed, ours = as_installed(result), result.best(result.after, ours=True)
    if installed is None or ours is None:
        return []
    rows: list[Row] = []
    for name, change, meaning, timing in [*_torch(result, installed), *_ours(result, ours.backend)]:
        if timing is not None and (not rows or timing is not rows[-1].timing):
            before = rows[-1].timing if rows else None
            rows.append(_row(result, installed, (name, change if before else "", meaning), timing, before))
    passed = [row.timing for row in rows]
    for name, meaning, peer in _peers(result):
        if peer is not None and peer not in passed:
            rows.append(_row(result, installed, (name, "", meaning), peer, None))
    return rows


def removals(rows: list[Row]) -> list[Removal]:
    """What each row takes away from the one above; together, the way from the first row to the last."""
    return [Removal.of(row.change, row.before, row.timing) for row in rows if row.before is not None]


_Described = tuple[str, str, str, PathTiming | None]


def _torch(result: ComparisonResult, installed: PathTiming) -> list[_Described]:
    return [
        (
            "torch, usual layout" if installed.pages == "cached" else "torch as installed",
            "",
            "Contiguous tensors; torch's convolutions, ReLU and pool.",
            installed,
        ),
        (
            "torch, better layout",
            "Torch's channels_last_3d layout instead of contiguous",
            "The same with channels_last_3d tensors.",
            result.best(result.before, ours=False),
        ),
    ]


def _ours(result: ComparisonResult, backend: str) -> list[_Described]:
    """The paths of one backend, from nothing fused to all of it, then with pages kept."""
    every = [timing for timing in result.cnn_paths(result.before) if timing.ours and timing.backend == backend]
    paths = [path for path in every if path.tf32 is not False and not path.graph]
    direct = next((path for path in paths if not path.fused), None)
    dense = next((path for path in paths if path.fused and path.dense_backward), None)
    sparse = next((path for path in paths if path.fused and not path.dense_backward), None)
    last = sparse or dense or direct
    return [
        (
            f"direct ({backend})",
            f"The hand-written convolution ({backend}) instead of torch's",
            "Every convolution is hand-written; ReLU and pool are torch's.",
            direct,
        ),
        (
            "+ fused forward",
            "Convolution, ReLU and pool in one pass forward",
            "What is pooled never exists forward. Backward is dense: the pooled gradient is scattered to a tensor of "
            "the size before the pool, which this row includes (in everything else), and both gradients visit all of "
            "its voxels.",
            dense,
        ),
        (
            "+ sparse backward",
            "A backward that visits only the voxels that the pool chose" if dense else "The fused pass, both ways,",
            "Both gradients visit only the voxels that the pool chose, one in eight; nothing is scattered.",
            sparse,
        ),
        (
            "+ pages kept",
            "Keeping freed pages instead of returning them to the system",
            "The C allocator keeps freed memory for the next step.",
            last and result.timing(last.path, result.after),
        ),
        (
            "+ CUDA graph",
            "Launching the whole step as one CUDA graph instead of kernel by kernel",
            "The host asks for the step once, and no kernel waits for it.",
            next((path for path in every if path.graph), None),
        ),
    ]


def _peers(result: ComparisonResult) -> list[tuple[str, str, PathTiming | None]]:
    pages = result.after
    state = in_state(pages)
    return [
        (
            f"torch{state or ', its best'}",
            f"Torch at its best: its faster layout{state}.",
            result.best(pages, ours=False),
        ),
        (
            "torch, CUDA graph",
            "Torch's faster layout, the whole step as one CUDA graph.",
            result.best(pages, ours=False, graph=True),
        ),
        (f"LSTM{state}", "The other network, on the same volumes.", result.lstm_step(pages)),
    ]


def _row(
    result: ComparisonResult,
    installed: PathTiming,
    words: tuple[str, str, str],
    timing: PathTiming,
    before: PathTiming | None,
) -> Row:
    lstm = result.lstm_step(timing.pages)
    to_lstm = timing.milliseconds / lstm.milliseconds if lstm and not timing.graph else None
    speed_up = installed.milliseconds / timing.milliseconds if timing.network == "cnn" else None
    return Row(*words, timing, before, to_lstm, speed_up, result.memory(timing.path))
