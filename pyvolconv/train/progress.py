"""What a person sees while a network trains: one bar with epoch, loss, accuracy, samples per second and time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SMOOTHING = 0.9
"""Share of the old value in the running loss and rate."""


class TrainingProgress:
    """A bar over all steps of a run; a context manager that draws nothing when the console is no terminal.

    Time left is to the last epoch allowed: a run that reaches its accuracy earlier ends earlier.

    Args:
        label: what is being trained.
        epochs: the last epoch allowed.
        steps: training steps per epoch.
        done: epochs finished before this run.
        console: where to draw; None is standard error.
        show: force drawing on or off; None draws on terminals only.
    """

    def __init__(
        self,
        label: str,
        epochs: int,
        steps: int,
        done: int = 0,
        console: Console | None = None,
        show: bool | None = None,
    ) -> None:
        console = console or Console(stderr=True)
        self._epochs = epochs
        self._loss: float | None = None
        self._rate: float | None = None
        self._last = time.perf_counter()
        self._bars = Progress(
            TextColumn("{task.description}"),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  {task.fields[rate]} samples/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not (console.is_terminal if show is None else show),
            refresh_per_second=4,
        )
        self._task = self._bars.add_task(
            label,
            total=epochs * steps,
            completed=done * steps,
            epoch=f"{done}/{epochs}",
            loss="-",
            accuracy="-",
            rate="-",
        )

    def __enter__(self) -> TrainingProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def epoch(self, number: int) -> None:
        """Epoch `number` begins; the clock of the first step starts now."""
        self._last = time.perf_counter()
        self._bars.update(self._task, epoch=f"{number}/{self._epochs}")

    def step(self, samples: int, loss: float, steps: int = 1) -> None:
        """One training step, or some of them, on `samples` samples in all ended with this loss."""
        now = time.perf_counter()
        rate = samples / max(now - self._last, 1e-9)
        self._last = now
        self._loss = _smooth(self._loss, loss)
        self._rate = _smooth(self._rate, rate)
        self._bars.update(self._task, advance=steps, loss=f"{self._loss:.3f}", rate=f"{self._rate:.0f}")

    def validated(self, accuracy: float) -> None:
        """The epoch's validation accuracy, 0 to 1."""
        self._bars.update(self._task, accuracy=f"{accuracy:.1%}")


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new
