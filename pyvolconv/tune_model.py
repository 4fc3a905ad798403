"""What `pyvolconv tune MODEL` does: build the model, hear what it asks for, time that, show it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from . import tuned
from .accelerate import accelerate
from .autotune import Tuned, geometric_mean, tune
from .errors import BackendError, UnsupportedProblemError
from .example_run import forward_and_backward
from .status import status
from .train.models import MISSION_SIZE, build

BUILT_IN = "cnn"
WIDE = 100
"""Columns of a terminal from which on there is room for these, too."""
ONLY_WIDE = ("Torch", "Untuned", "Regret")
DTYPES = ("float32", "float64", "float16", "bfloat16")


def find_model(name: str, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """The network of `pyvolconv compare` for "cnn", or what the callable "package.module:callable" returns.

    Args:
        name: as above.
        shapes: of the model's arguments; the built-in network is made for volumes of the first one's size.

    Raises:
        ValueError: there is no such model; the message says what is wrong with the name.
    """
    if name == BUILT_IN:
        depth, height, width = shapes[0][2:]
        return build("cnn", (depth, height, width))
    found = _found(name)
    model = _call(name, found) if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} gives a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _found(name: str) -> object:
    """What a name stands for; raises ValueError, which says what is wrong with it."""
    module_name, path = _split(name)
    # As `python -m` does: a command that is installed does not look into the folder where it is called.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}; looked in {Path.cwd()} and among what is installed") from error
    finally:
        sys.path.pop(0)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name!r}: {module_name} has no {path}")
        found = getattr(found, part)
    return found


def _call(name: str, make: Callable[[], object]) -> object:
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(f"{name!r} must be callable without arguments: {error}") from error
    return make()


def _split(name: str) -> tuple[str, str]:
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"{name!r} names no model; expected {BUILT_IN!r} or 'package.module:callable'")
    return module_name, path


def parse_inputs(name: str, inputs: Sequence[str]) -> list[tuple[int, ...]]:
    """Shapes out of texts like "2,1,32,64,64"; those of the built-in model where none is given.

    Raises:
        ValueError: a text is no shape, there is none, or the built-in model does not take such an input.

    Example:
        >>> parse_inputs("torch.nn:Conv3d", ["2,1,32,64,64", "2,10"])
        [(2, 1, 32, 64, 64), (2, 10)]
    """
    if not inputs:
        if name == BUILT_IN:
            return [(32, 1, *MISSION_SIZE)]
        _found(name)
        raise ValueError("give the shape of the model's input: --input N,C,D,H,W")
    shapes = []
    for text in inputs:
        sizes = text.replace("x", ",").split(",")
        if not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
            raise ValueError(f"--input {text!r} is no shape; expected sizes like 2,1,32,64,64")
        shapes.append(tuple(map(int, sizes)))
    if name == BUILT_IN and [len(shape) for shape in shapes] != [5]:
        raise ValueError(f"--input {' --input '.join(inputs)}: {BUILT_IN} takes one input of five sizes, N,C,D,H,W")
    return shapes


def tune_model(
    model: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: str = "float32",
    channels_last: bool = False,
    inference: bool = False,
    device: str = "cpu",
    seconds: float,
    again: bool = False,
    even_if_busy: bool = False,
    console: Console,
) -> list[Tuned]:
    """Time every pass that the accelerated model asks for on random inputs of these shapes, one per argument.

    Args:
        model: changed in place: accelerated, cast to `dtype`, in training mode or in eval mode with `inference`.
        shapes: of the model's arguments.
        dtype: of parameters and inputs.
        channels_last: whether parameters and 5-D inputs are in channels_last_3d.
        inference: the forward pass alone, without gradients.
        device: "cpu" or "cuda", where the model is put.
        seconds: bound on the timing.
        again: time passes whose times are known, too.
        even_if_busy: keep the times of a busy machine, too.
        console: where a line says what is being timed; if it is no terminal, lines on standard error do.

    Raises:
        ValueError: the dtype is none of those above, or the model does not run on such inputs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    model = accelerate(model.to(device, getattr(torch, dtype)).train(not inference))
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    with torch.no_grad() if inference else nullcontext(), status(console, "running the model") as say:
        examples = tuple(_example(shape, dtype, memory_format).to(device) for shape in shapes)
        try:
            _, asked = forward_and_backward(model, examples)
        except (BackendError, UnsupportedProblemError):
            raise
        except Exception as error:
            given = " ".join(f"--input {','.join(map(str, shape))}" for shape in shapes)
            raise ValueError(f"the model does not run on {given}: {str(error) or type(error).__name__}") from error
        return tune(
            asked,
            seconds,
            again=again,
            even_if_busy=even_if_busy,
            progress=say,
        )


def print_tuned(console: Console, found: Sequence[Tuned]) -> None:
    """The times as a table, and what they come to in a line or two."""
    if not found:
        console.print("Nothing was timed: no convolution ran on this input, or --seconds was too short.")
        return
    heads = {str(one.problem).rpartition("-n")[0] for one in found}
    head = heads.pop() if len(heads) == 1 else ""
    title = ", ".join(filter(None, ["Milliseconds per pass", head]))
    table = Table(title=title, title_justify="left", header_style="dim", box=None, padding=(0, 1))
    table.add_column("Problem", overflow="fold")
    columns = [column for column in COLUMNS if console.width >= WIDE or column not in ONLY_WIDE]
    for column in columns:
        text = column in ("Pass", "Fastest", "Untuned")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    for one in found:
        table.add_row(str(one.problem).removeprefix(f"{head}-"), *(COLUMNS[column](one) for column in columns))
    console.print(table)
    console.print(summary(found), soft_wrap=True)


def summary(found: Sequence[Tuned]) -> str:
    """Geometric means, and where the times are kept.

    Example:
        >>> from pyvolconv.problem import ConvProblem
        >>> problem = ConvProblem(1, 4, 4, (4, 4, 4), (3, 3, 3))
        >>> print(summary([Tuned(problem, "forward", {"a": 1.0, "aten": 3.0}, "a", False)]).split(". ")[0])
        1 pass, 0 of them timed before: 3.00x torch in the geometric mean
    """
    worst = max((one.regret for one in found if one.regret is not None), default=None)
    return (
        f"{len(found)} {'pass' if len(found) == 1 else 'passes'}, {sum(one.reused for one in found)} of them timed "
        f"before: {_ratio(geometric_mean(one.speed_up for one in found))} torch in the geometric mean. "
        f"Untuned, they would take {_ratio(geometric_mean(one.regret for one in found))} the time of the fastest, "
        f"{_ratio(worst)} at worst.\n{_where_kept(found)}"
    )


def _where_kept(found: Sequence[Tuned]) -> str:
    place = tuned.location()
    if place is None:
        return f"Not kept: {tuned.OFF_VARIABLE} is set"
    if (error := tuned.write_error()) is not None:
        return f"Not kept: {place} cannot be written ({error}); set {tuned.FOLDER_VARIABLE} to a folder that can"
    if all(one.kept for one in found):
        return f"Kept in {place}"
    return "Not kept, as other processes kept cores busy: tune again on a quiet machine, or with --even-if-busy"


def _example(shape: tuple[int, ...], dtype: str, memory_format: torch.memory_format) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    return values.to(memory_format=memory_format) if len(shape) == 5 else values


def _who(one: Tuned, backend: str) -> str:
    return "unfused" if backend == "aten" and one.problem.pool is not None else backend


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


COLUMNS: dict[str, Callable[[Tuned], str]] = {
    "Pass": lambda one: one.pass_,
    "Fastest": lambda one: _who(one, one.winner),
    "Time": lambda one: f"{one.best:.3g}",
    "Torch": lambda one: f"{one.milliseconds['aten']:.3g}" if "aten" in one.milliseconds else "-",
    "Speed-up": lambda one: _ratio(one.speed_up),
    "Untuned": lambda one: _who(one, one.expected),
    "Regret": lambda one: _ratio(one.regret),
}
