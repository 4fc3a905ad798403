"""What a comparison was asked for, and how it divides its time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .loop import TrainConfig

USER_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see `pyvolconv compare --help`."""

    quick: bool = False
    out: Path = Path("pyvolconv-report")
    data: Path | None = None
    seed: int = 1
    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    bidirectional: bool = False
    device: str = "cpu"
    resume: bool = False
    backends: tuple[str, ...] | None = None

    @property
    def chosen_learning_rate(self) -> float:
        """Of Adam: what was asked for, else the digits' own for the digits and a usual one for a user's volumes."""
        if self.learning_rate is not None:
            return self.learning_rate
        return TrainConfig.learning_rate if self.data is None else USER_LEARNING_RATE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report; the folder is left out, because a report may be moved."""
        return {
            "quick": self.quick,
            "data": self.data.name if self.data else None,
            "seed": self.seed,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.chosen_learning_rate,
            "bidirectional": self.bidirectional,
            "device": self.device,
            "backends": ",".join(self.backends) if self.backends else None,
        }


@dataclass(frozen=True)
class Budget:
    """How the time is spent.

    Attributes:
        total: seconds of the whole run, report included.
        trying: seconds after which no further path or layout is tried; one that is being tried then ends.
        steps: seconds of timing single steps, all paths and both allocator states together.
        repeats: profiled runs of every path.
    """

    total: float
    trying: float
    steps: float
    repeats: int

    @property
    def turns(self) -> float:
        """Seconds for timed turns in one allocator state: half of its time; the rest is for taking steps apart."""
        return self.steps / STATES / 2

    def longest_step(self, paths: int) -> float:
        """Seconds that a step of one of so many paths may take; a slower one gets fewer samples."""
        return self.steps / (STATES * paths * (FIXED_STEPS + 2 * self.repeats))


STATES = 2
FIXED_STEPS = 6
"""Steps that a path takes however short the time is: a warm-up, two turns, one for its memory, two of the profiler."""
QUICK = Budget(total=46.0, trying=8.0, steps=18.0, repeats=1)
FULL = Budget(total=270.0, trying=40.0, steps=110.0, repeats=2)
TRYING_ON_GPU = 240.0
"""What `trying` is on a GPU, where kernels may have to be compiled; usually it takes some seconds."""
QUICK_VIDEOS = (256, 128, 128)
"""Videos to train on, to validate and to test in a quick run, which is too short for as many as the full one has."""
LSTM_SHARE, OURS_SHARE = 0.3, 0.65
"""Shares of the time left: of all of it for the LSTM, of what it leaves for our CNN; torch's CNN takes the rest."""
