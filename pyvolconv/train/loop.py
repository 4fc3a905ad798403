"""The one training loop: the same optimiser, learning rate, batches and seed for every network on every path.

The loop knows no backend. It gets a model whose convolutions, device and memory layout are settled, and it is called
inside whatever forces a path. Two runs that differ only in the path therefore see the same batches in the same order
and differ only in rounding.

A run can be continued: after each epoch a checkpoint holds the model, the optimizer, every random state and the
history, and a resumed run ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from . import checkpoint
from .data import Splits, VolumeDataset, batches
from .progress import TrainingProgress

STEPS_UNREAD = 10
"""Steps after which losses are read from a GPU: each time, the host waits for it and then it for the host."""

StopReason = Literal["target", "max_epochs", "time_budget", "interrupted", "diverged"]


@dataclass(frozen=True)
class TrainConfig:
    """What must be the same for a fair comparison, and when to stop.

    Attributes:
        batch_size: samples per step, in training and validation.
        learning_rate: of Adam. The default suits the moving digits: see `pyvolconv.train.digits`.
        seed: of the order of the samples and of everything random inside a model.
        target_accuracy: stop after the epoch whose validation accuracy reaches it, 0 to 1.
        max_epochs: stop after this many epochs at the latest.
        time_budget: stop after this many seconds of wall-clock in this call, in the middle of an epoch if need be.

    Raises:
        ValueError: a value is out of range.
    """

    batch_size: int = 32
    learning_rate: float = 2.2e-5
    seed: int = 0
    target_accuracy: float = 0.99
    max_epochs: int = 120
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_epochs < 1:
            raise ValueError(f"batch_size={self.batch_size} and max_epochs={self.max_epochs} must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if not 0 < self.target_accuracy <= 1:
            raise ValueError(f"target_accuracy={self.target_accuracy} must be above 0 and at most 1")
        if self.time_budget is not None and not self.time_budget > 0:
            raise ValueError(f"time_budget={self.time_budget} must be a positive number of seconds, or None")


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch measured.

    Attributes:
        epoch: its number, from 1.
        samples: training samples seen; fewer than the training set when the epoch was cut short.
        train_loss, train_accuracy: means over those samples, each taken before the step on its batch.
        validation_accuracy: after the epoch; None when it was cut short.
        train_seconds: wall-clock of the training steps, loading of batches included.
        validation_seconds: wall-clock of the validation.
        wall_seconds: wall-clock since training began, over all resumed parts, everything included.
    """

    epoch: int
    samples: int
    train_loss: float
    train_accuracy: float
    validation_accuracy: float | None
    train_seconds: float
    validation_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class TrainResult:
    """A finished or stopped run.

    Attributes:
        config: what was asked for.
        stopped: why it ended. "interrupted" is a Ctrl-C, "diverged" a loss that is not finite.
        history: every epoch, the last one perhaps cut short.
    """

    config: TrainConfig
    stopped: StopReason
    history: list[EpochRecord] = field(default_factory=list)

    @property
    def complete_epochs(self) -> list[EpochRecord]:
        """The epochs that ran to the end, validation included."""
        return [record for record in self.history if record.validation_accuracy is not None]

    @property
    def at_target(self) -> EpochRecord | None:
        """The first epoch whose validation accuracy reached the target, or None."""
        reached = (
            record
            for record in self.complete_epochs
            if record.validation_accuracy is not None and record.validation_accuracy >= self.config.target_accuracy
        )
        return next(reached, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back. A loss that is not finite becomes None."""
        plain = dataclasses.asdict(self)
        for record in plain["history"]:
            if not math.isfinite(record["train_loss"]):
                record["train_loss"] = None
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainResult:
        """The result that `to_dict` wrote."""
        records = [
            EpochRecord(**{**record, "train_loss": math.nan if record["train_loss"] is None else record["train_loss"]})
            for record in plain["history"]
        ]
        return cls(TrainConfig(**plain["config"]), plain["stopped"], records)


def make_optimizer(
    model: nn.Module, learning_rate: float = TrainConfig.learning_rate, capturable: bool = False
) -> torch.optim.Adam:
    """Adam with torch's defaults, for every network and path; `capturable` for a step that becomes a CUDA graph."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, capturable=capturable)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One step on a batch: zero_grad, forward, cross-entropy, backward, update.

    Returns:
        (loss, correct): mean loss and number of right answers of the batch, both before the update; scalars on the
        model's device, for which nobody has waited yet.
    """
    optimizer.zero_grad(set_to_none=True)
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, y)
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == y).sum()


def to_device(values: Tensor, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    """Part of a batch on a device and in a memory order; to a GPU by a copy that the host need not wait for.

    With one channel both memory orders are the same values in the same places: then nothing is copied on a device.
    """
    if values.device == device and values.is_contiguous(memory_format=memory_format):
        # Of torch's two ways to write the strides, the one by which operators recognise the order.
        strides = torch.empty(values.shape, device="meta", memory_format=memory_format).stride()
        return values.as_strided(values.shape, strides)
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True, memory_format=memory_format)
    return values.to(device, memory_format=memory_format)


def train(
    model: nn.Module,
    data: Splits,
    config: TrainConfig | None = None,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    checkpoint_path: Path | None = None,
    resume: bool = False,
    label: str = "training",
    show_progress: bool | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train until the target accuracy, the last epoch, the end of the time budget or Ctrl-C.

    Args:
        model: takes B x 1 x D x H x W, gives B x classes; trained in place, on the device where it is, and left in
            evaluation mode. torch's global random state is left as it was.
        data: batches come from `data.train` and `data.validation`.
        config: `TrainConfig()` when None.
        memory_format: of the batches; the model's weights are the caller's affair.
        checkpoint_path: written after each epoch.
        resume: go on from `checkpoint_path` where that file exists. `max_epochs`, `target_accuracy` and
            `time_budget` may differ from those of the first part.
        label: in front of the progress bar.
        show_progress: None shows it on a terminal only.
        console: where the bar is drawn; None is standard error.

    Returns:
        What was measured, whatever ended the run.

    Raises:
        CheckpointError: the checkpoint cannot be written, or is not one of this run; the model is then unchanged.
        ValueError: `resume` without `checkpoint_path`.
    """
    config = config or TrainConfig()
    if resume and checkpoint_path is None:
        raise ValueError("resume=True needs checkpoint_path")
    with _own_random_state(model, config.seed):
        run = _Run(model, data, config, memory_format)
        if resume and checkpoint_path is not None and checkpoint_path.exists():
            run.load(checkpoint_path)
        steps = math.ceil(len(data.train) / config.batch_size)
        bar = TrainingProgress(label, config.max_epochs, steps, len(run.history), console, show_progress)
        try:
            with bar:
                stopped = run.until_stopped(bar, checkpoint_path)
        except KeyboardInterrupt:
            run.cut_short()
            stopped = "interrupted"
        finally:
            model.eval()
    return TrainResult(config, stopped, run.history)


def accuracy(
    model: nn.Module,
    dataset: VolumeDataset,
    batch_size: int = 32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> float:
    """Share of a dataset that a model classifies rightly, 0 to 1; the model is put into evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for x, y in batches(dataset, batch_size):
            logits = model(to_device(x, device, memory_format))
            correct += (logits.argmax(1) == y.to(device)).sum()
    return int(correct) / len(dataset)


class _Run:
    """The moving parts of one call of `train`."""

    def __init__(self, model: nn.Module, data: Splits, config: TrainConfig, memory_format: torch.memory_format) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.memory_format = memory_format
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config.learning_rate)
        self.shuffle = torch.Generator().manual_seed(config.seed)
        self.history: list[EpochRecord] = []
        self.began = time.perf_counter()
        self.earlier_seconds = 0.0
        self.epoch_began = self.began
        self.samples = 0
        self.correct = 0
        self.loss_sum = 0.0
        self.train_seconds = 0.0
        self.unread: list[tuple[int, Tensor, Tensor]] = []
        self.most_unread = STEPS_UNREAD if self.device.type == "cuda" else 1

    def until_stopped(self, bar: TrainingProgress, checkpoint_path: Path | None) -> StopReason:
        while True:
            if self.history and (self.history[-1].validation_accuracy or 0.0) >= self.config.target_accuracy:
                return "target"
            if len(self.history) >= self.config.max_epochs:
                return "max_epochs"
            if self._out_of_time():
                return "time_budget"
            cut = self._epoch(bar)
            if cut is not None:
                self.cut_short()
                return cut
            if checkpoint_path is not None:
                self.save(checkpoint_path)

    def _epoch(self, bar: TrainingProgress) -> StopReason | None:
        """Train and validate once; the reason when the epoch could not be finished."""
        bar.epoch(len(self.history) + 1)
        self._start_epoch()
        self.model.train()
        for x, y in batches(self.data.train, self.config.batch_size, self.shuffle):
            x = to_device(x, self.device, self.memory_format)
            y = to_device(y, self.device, torch.contiguous_format)
            self.unread.append((len(y), *training_step(self.model, self.optimizer, x, y)))
            if len(self.unread) < self.most_unread:
                continue
            if not self._read(bar):
                return "diverged"
            if self._out_of_time() and self.samples < len(self.data.train):
                return "time_budget"
        if not self._read(bar):
            return "diverged"
        validation_began = time.perf_counter()
        validated = accuracy(self.model, self.data.validation, self.config.batch_size, self.memory_format)
        self.history.append(self._record(validated, time.perf_counter() - validation_began))
        self.samples = 0
        bar.validated(validated)
        return None

    def _read(self, bar: TrainingProgress) -> bool:
        """Take in what the steps since the last time gave; whether all of their losses are finite."""
        read = [(samples, float(loss), int(correct)) for samples, loss, correct in self.unread]
        self.unread.clear()
        self.train_seconds = time.perf_counter() - self.epoch_began
        for samples, loss, correct in read:
            self.samples += samples
            self.loss_sum += loss * samples
            self.correct += correct
        if read:
            bar.step(sum(samples for samples, _, _ in read), read[-1][1], len(read))
        return all(math.isfinite(loss) for _, loss, _ in read)

    def cut_short(self) -> None:
        """Keep what the unfinished epoch measured, if it measured anything."""
        if self.samples:
            self.history.append(self._record(None, 0.0))
            self.samples = 0

    def _start_epoch(self) -> None:
        self.epoch_began = time.perf_counter()
        self.samples, self.correct = 0, 0
        self.loss_sum, self.train_seconds = 0.0, 0.0
        self.unread.clear()

    def _record(self, validated: float | None, validation_seconds: float) -> EpochRecord:
        return EpochRecord(
            epoch=len(self.history) + 1,
            samples=self.samples,
            train_loss=self.loss_sum / self.samples,
            train_accuracy=self.correct / self.samples,
            validation_accuracy=validated,
            train_seconds=self.train_seconds,
            validation_seconds=validation_seconds,
            wall_seconds=self.earlier_seconds + time.perf_counter() - self.began,
        )

    def _out_of_time(self) -> bool:
        budget = self.config.time_budget
        return budget is not None and time.perf_counter() - self.began >= budget

    def _settings(self) -> dict[str, Any]:
        same = ("batch_size", "learning_rate", "seed")
        return {**{name: getattr(self.config, name) for name in same}, "data": self.data.fingerprint()}

    def save(self, path: Path) -> None:
        history = [dataclasses.asdict(record) for record in self.history]
        checkpoint.save(path, self.model, self.optimizer, self.shuffle, self._settings(), history)

    def load(self, path: Path) -> None:
        stored = checkpoint.load(path, self.model, self.optimizer, self.shuffle, self._settings())
        self.history = [EpochRecord(**record) for record in stored]
        self.earlier_seconds = self.history[-1].wall_seconds if self.history else 0.0


@contextmanager
def _own_random_state(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch inside the block and give the caller's random state back afterwards."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(seed)
        yield
