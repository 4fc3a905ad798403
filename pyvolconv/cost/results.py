"""What a comparison measured, as plain values: everything that the report shows and `results.json` keeps.

Nothing here measures, prints or draws. Times are milliseconds per training step or seconds of wall-clock, as the
name says; rates are GF/s (10^9 floating-point operations per second, an FMA counted as two) and GB/s (10^9 bytes).
A value that could not be measured is `None`, never zero.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .machine import Machine
from .profiler import StepEntry, StepProfile

SCHEMA_VERSION = 1

Pages = Literal["returned", "kept"]
"""Whether the C allocator hands freed memory back to the system ("returned", its default) or reuses it."""

PAGES: tuple[Pages, ...] = ("returned", "kept")
TARGET_ACCURACY = 0.99
SMALL_SHARE = 0.002


@dataclass(frozen=True)
class DataFacts:
    """The volumes that were learnt from. `shape` is (D, H, W) in voxels."""

    source: str
    description: str
    shape: tuple[int, int, int]
    classes: int
    train: int
    validation: int
    test: int
    frame_average_accuracy: float | None = None


@dataclass(frozen=True)
class NetworkFacts:
    """One of the two peers. `flops` is one training step on one sample: forward, both gradients, loss, optimizer.

    `weight_uses` is how many times a weight takes part in a forward pass of one sample, averaged over the weights.
    """

    name: str
    description: str
    parameters: int
    flops: float
    weight_uses: float


@dataclass(frozen=True)
class Epoch:
    """One finished epoch; `seconds` is wall-clock since training began, validation included."""

    number: int
    seconds: float
    train_seconds: float
    loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class TrainingRun:
    """One network trained by the one training loop.

    Attributes:
        label: what the report calls it, for example "CNN, ours".
        network: "cnn" or "lstm".
        path: name of the `PathTiming` whose kernels ran.
        epochs: the epochs that ran, in order.
        estimated_seconds_per_epoch: set when not one epoch fitted into the time budget: the training steps that
            were measured, scaled to a whole epoch, without validation.
        projected_epochs_to_target: set when this run was cut short by its time budget and the same mathematics,
            run to the end on another path, says in which epoch the target is reached.
        test_accuracy: of the last weights; None when the run was cut short.
        stopped: why it ended: "target", "max_epochs", "time_budget", "interrupted" or "diverged".
    """

    label: str
    network: str
    path: str
    ours: bool
    pages: Pages
    epochs: list[Epoch]
    test_accuracy: float | None = None
    projected_epochs_to_target: int | None = None
    estimated_seconds_per_epoch: float | None = None
    stopped: str = "target"
    target: float = TARGET_ACCURACY

    @property
    def seconds_per_epoch(self) -> float | None:
        """Mean wall-clock of an epoch, validation included; without the first where there are others (warm-up)."""
        if not self.epochs:
            return self.estimated_seconds_per_epoch
        if len(self.epochs) == 1:
            return self.epochs[0].seconds
        return (self.epochs[-1].seconds - self.epochs[0].seconds) / (len(self.epochs) - 1)

    @property
    def measured_epochs_to_target(self) -> int | None:
        """The first epoch whose validation accuracy reached the target, or None."""
        return next((epoch.number for epoch in self.epochs if epoch.validation_accuracy >= self.target), None)

    @property
    def epochs_to_target(self) -> int | None:
        """Measured where this run got there, else projected, else None."""
        return self.measured_epochs_to_target or self.projected_epochs_to_target

    @property
    def seconds_to_target(self) -> float | None:
        """Wall-clock to the target: measured, or seconds per epoch times the projected number of epochs."""
        measured = self.measured_epochs_to_target
        if measured is not None:
            return next(epoch.seconds for epoch in self.epochs if epoch.number == measured)
        if self.projected_epochs_to_target is None or self.seconds_per_epoch is None:
            return None
        return self.seconds_per_epoch * self.projected_epochs_to_target

    @property
    def projected(self) -> bool:
        """Whether `epochs_to_target` was taken from another run of the same mathematics."""
        return self.measured_epochs_to_target is None and self.projected_epochs_to_target is not None

    def derived(self) -> dict[str, Any]:
        """The figures that follow from the epochs."""
        names = ("seconds_per_epoch", "epochs_to_target", "seconds_to_target", "projected")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PathTiming:
    """One training step of one network on one path and one allocator state.

    `milliseconds` is the median step; the four parts add up to it. A part is None where the network has no
    convolution. `samples` is how many samples the timed step really had: fewer than the batch for a path so slow
    that its time was scaled up from a smaller batch. `gradient_difference` is |g - g_torch| / |g_torch| over all
    parameter gradients of one step.
    """

    path: str
    network: str
    backend: str
    layout: str | None
    ours: bool
    pages: Pages
    milliseconds: float
    forward: float | None
    grad_input: float | None
    grad_weight: float | None
    other: float | None
    steps: int
    samples: int
    batch_size: int
    page_faults: float | None = None
    gradient_difference: float | None = None

    @property
    def scaled(self) -> bool:
        """Whether the time was scaled up from fewer samples than the batch."""
        return self.samples < self.batch_size


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
        return f"{self.path}, pages {self.pages}"

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
            label = "between operators"
            rows.append(LayerRow(label, "", "framework", phase, spent * 1e3, 0.0, 0.0, faults, None, ""))
        return rows

    def main_rows(self) -> list[LayerRow]:
        """`rows()` for people: those below `SMALL_SHARE` of the step are summed up in one last row."""
        rows = self.rows()
        limit = SMALL_SHARE * sum(row.milliseconds for row in rows)
        small = [row for row in rows if row.milliseconds < limit]
        rest = LayerRow(
            label=f"{len(small)} smaller items",
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


@dataclass(frozen=True)
class ComparisonResult:
    """One run of `pyvolconv compare`, complete or as far as it got."""

    date: str
    versions: dict[str, str]
    settings: dict[str, Any]
    machine: Machine | None = None
    data: DataFacts | None = None
    networks: list[NetworkFacts] = field(default_factory=list)
    training: list[TrainingRun] = field(default_factory=list)
    paths: list[PathTiming] = field(default_factory=list)
    profiles: list[PathProfile] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def before(self) -> Pages:
        """The allocator state that stands for torch as installed; on CUDA, whose allocator keeps memory, "kept"."""
        return "kept" if self._pages() == {"kept"} else "returned"

    @property
    def after(self) -> Pages:
        """The allocator state that stands for this package: "kept" wherever the machine can do that."""
        return "kept" if "kept" in self._pages() else "returned"

    def _pages(self) -> set[Pages]:
        return {timing.pages for timing in self.paths}

    def network(self, name: str) -> NetworkFacts | None:
        """The network of that name, if it was described."""
        return next((network for network in self.networks if network.name == name), None)

    def timing(self, path: str, pages: Pages) -> PathTiming | None:
        """The step of one path in one allocator state, if it was timed."""
        return next((timing for timing in self.paths if timing.path == path and timing.pages == pages), None)

    def timings(self, pages: Pages) -> list[PathTiming]:
        """Every step in one allocator state: the CNN's paths, then the LSTM."""
        lstm = self.lstm_step(pages)
        return self.cnn_paths(pages) + ([lstm] if lstm else [])

    def cnn_paths(self, pages: Pages) -> list[PathTiming]:
        """The CNN's steps in one allocator state, in the order in which they were listed."""
        return [timing for timing in self.paths if timing.network == "cnn" and timing.pages == pages]

    def lstm_step(self, pages: Pages) -> PathTiming | None:
        """The LSTM's step in one allocator state."""
        return next((timing for timing in self.paths if timing.network == "lstm" and timing.pages == pages), None)

    def best(self, pages: Pages, *, ours: bool) -> PathTiming | None:
        """The fastest CNN step of ours or of torch's in one allocator state."""
        candidates = [timing for timing in self.cnn_paths(pages) if timing.ours is ours]
        return min(candidates, key=lambda timing: timing.milliseconds, default=None)

    def shown_profiles(self) -> list[PathProfile]:
        """The profiles that the plots set side by side: torch's and ours in one allocator state."""
        return [found for found in self.profiles if found.pages == self.after] or self.profiles

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, derived figures included, ready for JSON."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain["machine"] = self.machine.to_dict() if self.machine else None
        plain["data"] = dataclasses.asdict(self.data) if self.data else None
        plain["networks"] = [dataclasses.asdict(network) for network in self.networks]
        plain["training"] = [{**dataclasses.asdict(run), **run.derived()} for run in self.training]
        plain["paths"] = [{**dataclasses.asdict(timing), "scaled": timing.scaled} for timing in self.paths]
        plain["profiles"] = [found.to_dict() for found in self.profiles]
        return {"schema_version": SCHEMA_VERSION, **plain}

    def write_json(self, path: Path, **more: Any) -> None:
        """Write everything, and `more`, as JSON. Values that are not finite become null: JSON has no word for them."""
        plain = _finite({**self.to_dict(), **more})
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
