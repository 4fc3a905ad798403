"""The state of a training run between two epochs, on disk.

A checkpoint is written to a temporary file beside its place and then renamed over it, so at any moment the file is
either the old epoch or the new one, whole. It is read with `weights_only=True`: it cannot run code.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

FORMAT = 1
EXPECTED = {
    "format": int,
    "model": dict,
    "optimizer": dict,
    "random": dict,
    "shuffle": Tensor,
    "settings": dict,
    "history": list,
}
"""What a checkpoint holds, by name and kind."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or continued; the message is one line with the file's name."""


def save(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    shuffle: torch.Generator,
    settings: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Write everything that the next epoch depends on.

    Args:
        path: the file; its folder is made when missing.
        model, optimizer: whose states are kept.
        shuffle: the generator that orders the samples.
        settings: plain values that a later run must agree with to continue this one.
        history: the epochs so far, plain values.

    Raises:
        CheckpointError: the file cannot be written.
    """
    state = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": _random_states(model),
        "shuffle": shuffle.get_state(),
        "settings": dict(settings),
        "history": history,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be written: {_one_line(error)}") from error


def load(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    shuffle: torch.Generator,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Put model, optimizer and all random states back to where `save` saw them; return the history.

    Nothing is changed when an error is raised.

    Raises:
        CheckpointError: the file is unreadable, damaged, of another format, or of another run than `settings` and
            the model say; the message names the difference.
    """
    state = _read(path)
    for name, now in settings.items():
        then = state["settings"].get(name)
        if then != now:
            raise CheckpointError(
                f"{path}: this checkpoint was made with {name}={then!r}, this run has {name}={now!r}; "
                "use the same settings or start afresh without resuming"
            )
    _check_model(path, state["model"], model)
    before = optimizer.state_dict()
    try:
        optimizer.load_state_dict(state["optimizer"])
        shuffle.set_state(state["shuffle"])
        _set_random_states(state["random"], model)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        optimizer.load_state_dict(before)
        raise CheckpointError(f"{path}: the checkpoint is damaged: {_one_line(error)}; start afresh") from error
    model.load_state_dict(state["model"])
    history: list[dict[str, Any]] = state["history"]
    return history


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no checkpoint to resume from; start without resuming") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {_one_line(error)}; start afresh") from error
    if not isinstance(state, dict) or not EXPECTED.keys() <= state.keys() or state["format"] != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint of this version (format {FORMAT}); start afresh")
    for name, kind in EXPECTED.items():
        if not isinstance(state[name], kind):
            raise CheckpointError(f"{path}: the checkpoint is damaged: {name} is a {type(state[name]).__name__}")
    return state


def _check_model(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    if stored != shapes:
        name = next(name for name in {**shapes, **stored} if stored.get(name) != shapes.get(name))
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another model: its {name} is {stored.get(name, 'missing')}, "
            f"expected {shapes.get(name, 'none')}; use the same model or start afresh without resuming"
        )


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({value.device for value in model.parameters() if value.device.type == "cuda"}, key=str)


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    states = {str(device): torch.cuda.get_rng_state(device) for device in _cuda_devices(model)}
    return {"cpu": torch.get_rng_state(), **states}


def _set_random_states(states: Mapping[str, Tensor], model: nn.Module) -> None:
    torch.set_rng_state(states["cpu"])
    for device in _cuda_devices(model):
        torch.cuda.set_rng_state(states[str(device)], device)


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
