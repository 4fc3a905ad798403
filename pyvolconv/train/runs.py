"""The training runs of a comparison: the LSTM, the CNN on our path, the CNN on torch's, each within its time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from ..cost.breakdown import Pages
from ..cost.results import Epoch, TrainingRun
from .data import Splits
from .loop import EpochRecord, TrainConfig, TrainResult, accuracy, train
from .models import NetworkName, build
from .steps import MEMORY_FORMAT, PathSpec, on_path, prepare


@dataclass(frozen=True)
class Trainer:
    """What all runs of a comparison share.

    Attributes:
        data: the volumes.
        config: of every run; `time_budget` is set for each.
        device: where the networks run.
        pages: the state of the C allocator, for the record.
        folder: where checkpoints are kept.
        resume: go on from the checkpoints found there.
        console: where progress is drawn.
    """

    data: Splits
    config: TrainConfig
    device: str
    pages: Pages
    folder: Path
    resume: bool
    console: Console

    def run(self, name: NetworkName, spec: PathSpec, label: str, seconds: float | None) -> tuple[TrainingRun, bool]:
        """Train one network on one path for at most `seconds`, then test it if its training came to an end.

        Returns:
            The run, and whether Ctrl-C ended it.
        """
        model = build(name, self.data.input_size, self.data.classes, self.config.seed).to(self.device)
        prepare(spec, model)
        memory_format = MEMORY_FORMAT[spec.layout] if spec.layout else torch.contiguous_format
        name_of_file = "-".join([spec.network, *spec.path.replace(",", "").split()]).lower()
        with on_path(spec):
            result = train(
                model,
                self.data,
                replace(self.config, time_budget=seconds),
                memory_format=memory_format,
                checkpoint_path=self.folder / f"{name_of_file}.pt",
                resume=self.resume,
                label=label,
                console=self.console,
            )
            ended = result.stopped in ("target", "max_epochs")
            tested = accuracy(model, self.data.test, self.config.batch_size, memory_format) if ended else None
        run = TrainingRun(
            label=label,
            network=spec.network,
            path=spec.path,
            ours=spec.ours,
            pages=self.pages,
            epochs=[_epoch(record) for record in result.complete_epochs],
            test_accuracy=tested,
            estimated_seconds_per_epoch=self._estimate(result),
            stopped=result.stopped,
            target=self.config.target_accuracy,
        )
        return run, result.stopped == "interrupted"

    def _estimate(self, result: TrainResult) -> float | None:
        """Seconds of a whole epoch's training steps, from the epoch that was cut short, if there is no whole one."""
        if result.complete_epochs or not result.history:
            return None
        cut = result.history[-1]
        return cut.train_seconds / cut.samples * len(self.data.train)


def projected(run: TrainingRun, complete: TrainingRun | None) -> TrainingRun:
    """The run with the epochs to the target that a complete run of the same network needed, where its own are missing.

    Every path computes the same mathematics from the same weights on the same batches, so that runs differ in rounding
    only. A run that came to its own end keeps its own answer.
    """
    if run.stopped in ("target", "max_epochs") or complete is None:
        return run
    return replace(run, projected_epochs_to_target=complete.measured_epochs_to_target)


def _epoch(record: EpochRecord) -> Epoch:
    return Epoch(
        number=record.epoch,
        seconds=record.wall_seconds,
        train_seconds=record.train_seconds,
        loss=record.train_loss,
        validation_accuracy=record.validation_accuracy or 0.0,
    )
