"""What a comparison measured, as plain values: everything that the report shows and `results.json` keeps.

Nothing here measures, prints or draws. Times are milliseconds per training step or seconds of wall-clock, as the
name says; rates are GF/s (10^9 floating-point operations per second, an FMA counted as two) and GB/s (10^9 bytes).
A value that could not be measured is `None`, never zero.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .breakdown import Pages, PathProfile
from .machine import Machine

SCHEMA_VERSION = 1

PAGES: tuple[Pages, ...] = ("returned", "kept", "cached")
TARGET_ACCURACY = 0.99


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
    that its time was scaled up from a smaller batch. `fused` says that convolution, activation and pool ran as one
    pass, `dense_backward` that the gradients of such passes visited every voxel and not only those that the pool chose.
    `gradient_difference` is |g - g64| / |g64| over all parameter gradients of one step, g64 being torch's in float64.
    `memory_bytes` is what a step adds to the resident process at its peak; it is measured with pages returned only,
    because a process that keeps its pages does not shrink between steps. On a GPU it is what a step adds to the memory
    that torch has allocated there. `tf32` says whether float32 convolutions could round to TF32, None on the CPU and
    where a path does not know the switch; `graph` that the step is one CUDA graph.
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
    fused: bool = False
    dense_backward: bool = False
    page_faults: float | None = None
    gradient_difference: float | None = None
    memory_bytes: int | None = None
    tf32: bool | None = None
    graph: bool = False

    @property
    def scaled(self) -> bool:
        """Whether the time was scaled up from fewer samples than the batch."""
        return self.samples < self.batch_size


BUSY = "Other processes kept"
"""How the notes begin of a comparison that was disturbed."""


@dataclass(frozen=True)
class ComparisonResult:
    """One run of `pyvolconv compare`, complete or as far as it got.

    `sections` says how many seconds each part took, `error` why the training could not be done after the measurements
    had been.
    """

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
    error: str | None = None
    sections: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall-clock of all sections, in seconds."""
        return sum(self.sections.values())

    @property
    def before(self) -> Pages:
        """The allocator state that stands for torch as installed: the first one that was measured."""
        return next((pages for pages in PAGES if pages in self._pages()), "returned")

    @property
    def after(self) -> Pages:
        """The allocator state that stands for this package: "kept" wherever the machine can do that."""
        return next((pages for pages in reversed(PAGES) if pages in self._pages()), "returned")

    def _pages(self) -> set[Pages]:
        return {timing.pages for timing in self.paths}

    def network(self, name: str) -> NetworkFacts | None:
        """The network of that name, if it was described."""
        return next((network for network in self.networks if network.name == name), None)

    def timing(self, path: str, pages: Pages) -> PathTiming | None:
        """The step of one path in one allocator state, if it was timed."""
        return next((timing for timing in self.paths if timing.path == path and timing.pages == pages), None)

    def memory(self, path: str) -> int | None:
        """What a step of that path adds at its peak, in bytes, in whichever allocator state it was measured."""
        found = (timing.memory_bytes for timing in self.paths if timing.path == path)
        return next((size for size in found if size is not None), None)

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

    def best(self, pages: Pages, *, ours: bool, graph: bool = False) -> PathTiming | None:
        """The fastest CNN step of ours or of torch's in one allocator state, as a CUDA graph or else as it is.

        What a GPU computes without TF32 does not compete: neither side would be asked for that by default. What was
        scaled up from a few samples is only taken where nothing ran on whole batches.
        """
        candidates = [
            timing
            for timing in self.cnn_paths(pages)
            if timing.ours is ours and timing.graph is graph and timing.tf32 is not False
        ]
        return min(candidates, key=lambda timing: (timing.scaled, timing.milliseconds), default=None)

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
        return {"schema_version": SCHEMA_VERSION, "seconds": self.seconds, **plain}

    def write_json(self, path: Path, **more: Any) -> None:
        """Write everything, and `more`, as JSON. Values that are not finite become null: JSON has no word for them."""
        plain = _finite({**self.to_dict(), **more})
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
