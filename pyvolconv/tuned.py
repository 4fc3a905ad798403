"""Times measured for passes of problems, in memory and on disk: what the dispatcher asks before its cost model.

`remember` takes times in; `milliseconds` gives those that hold here and now: measured on this processor, with this
instruction set, number of threads, precision and these versions, compiled kernels included. They are kept in the file
`location()`, read once per process. Environment variables: PYVOLCONV_CACHE_DIR names another folder for it,
PYVOLCONV_NO_CACHE=1 has it neither read nor written. A file that is no use, for whatever reason, is reported by one
warning in the life of a process and never by an error.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path

import platformdirs
import torch

from . import tuned_file
from .backends.cpp import load_extension
from .backends.sources import sources_digest
from .host import processor, version
from .precision import (
    convolves_float32_in_bfloat16,
    float32_arithmetic,
    get_precision,
    multiplies_float32_in_bfloat16,
)
from .problem import ConvProblem, Pass
from .tuned_file import Setting, Table

FOLDER_VARIABLE = "PYVOLCONV_CACHE_DIR"
OFF_VARIABLE = "PYVOLCONV_NO_CACHE"

logger = logging.getLogger("pyvolconv")
_lock = threading.Lock()
_tables: dict[Setting, Table] | None = None
_complained = False
_write_error: str | None = None


TIE = 0.04
"""Share of its time by which torch's own kernel has to be beaten: medians of single calls differ by as much."""


def winner_of(times: Mapping[str, float]) -> str:
    """Whom to take of those that were timed: the fastest, and of a tie with torch's own kernel that one.

    Args:
        times: as `milliseconds` gives them, not empty.

    Example:
        >>> winner_of({"cpp.direct": 1.0, "aten": 1.1}), winner_of({"cpp.direct": 1.0, "aten": 1.02})
        ('cpp.direct', 'aten')
    """
    fastest = min(times, key=times.__getitem__)
    return "aten" if "aten" in times and times[fastest] >= (1 - TIE) * times["aten"] else fastest


def milliseconds(problem: ConvProblem, pass_: Pass) -> Mapping[str, float]:
    """Name of a backend, or "name@configuration" -> median time that was measured for a pass under the present setting.

    Empty where nothing was. Of a problem with a pool, "aten" is the pass put together from torch's convolution and
    torch's pooling.
    """
    tables = _loaded()
    if not tables:
        return {}
    return tables.get(current_setting(problem.device), {}).get(str(problem), {}).get(pass_, {})


def remember(found: Mapping[tuple[ConvProblem, Pass], Mapping[str, float]], *, keep: bool = True) -> None:
    """Take in times that were measured just now, in milliseconds by backend name; with `keep` add them to the file."""
    global _write_error
    tables = _loaded()
    by_setting: dict[Setting, Table] = {}
    for (problem, pass_), times in found.items():
        table = by_setting.setdefault(current_setting(problem.device), {})
        table.setdefault(str(problem), {})[pass_] = dict(times)
    path = location() if keep else None
    for setting, table in by_setting.items():
        with _lock:
            known = tables.setdefault(setting, {})
            for text, passes in table.items():
                known[text] = known.get(text, {}) | passes
        if path is not None:
            try:
                tuned_file.add(path, setting, table)
                _write_error = None
            except OSError as error:
                _write_error = str(error)
                _complain(
                    f"tuned choices cannot be kept in {path} ({error}); they hold in this process only: set "
                    f"{FOLDER_VARIABLE} to a folder that can be written"
                )


def location() -> Path | None:
    """The file in which times are kept, or None where PYVOLCONV_NO_CACHE turns it off."""
    if os.environ.get(OFF_VARIABLE, "") not in ("", "0"):
        return None
    folder = os.environ.get(FOLDER_VARIABLE) or platformdirs.user_cache_dir("pyvolconv", appauthor=False)
    return Path(folder) / "tuned.json"


def write_error() -> str | None:
    """Why the last times of this process could not be kept, or None."""
    return _write_error


def count(device: str = "cpu") -> int:
    """How many problems have times that hold here and now, on "cpu" or "cuda"."""
    return len(_loaded().get(current_setting(device), {}))


def forget() -> None:
    """Drop what is in memory, so that the file is read again when next asked for."""
    global _tables, _complained, _write_error
    with _lock:
        _tables, _complained, _write_error = None, False, None


def current_setting(device: str) -> Setting:
    """What times measured now on "cpu" or "cuda" depend on."""
    extension, _ = load_extension()
    if device == "cuda":
        conv, matmul = (float32_arithmetic(device, operation) for operation in ("conv", "matmul"))
        precision = f"{get_precision()}, float32 in {conv}, its products in {matmul}"
    else:
        precision = (
            get_precision()
            + (", float32 in bfloat16" if convolves_float32_in_bfloat16() else "")
            + (", its products in bfloat16" if multiplies_float32_in_bfloat16() else "")
        )
    return Setting(
        processor=torch.cuda.get_device_name() if device == "cuda" else _processor(),
        isa="none" if extension is None else extension.current_isa(),
        threads=torch.get_num_threads(),
        precision=precision,
        pyvolconv=_version(),
        torch=str(torch.__version__),
        extension=sources_digest() if device == "cuda" else _digest(),
    )


def _loaded() -> dict[Setting, Table]:
    global _tables
    with _lock:
        if _tables is None:
            _tables = _read()
        return _tables


def _read() -> dict[Setting, Table]:
    path = location()
    if path is None:
        return {}
    try:
        tables = tuned_file.read(path)
    except (OSError, ValueError) as error:
        _complain(f"the tuned choices in {path} cannot be read and are left out ({error})")
        return {}
    # A GPU's name is not asked for before the process uses it: that would keep it from being forked.
    for device in ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",):
        here = current_setting(device)
        of_this_processor = [setting for setting in tables if setting.processor == here.processor]
        if of_this_processor and not any(setting.has_builds_of(here) for setting in of_this_processor):
            _complain(
                f"the tuned choices in {path} were measured with another build or version of pyvolconv or torch and "
                "are left out; `pyvolconv tune` or accelerate(model, example) measures again"
            )
    return tables


def _complain(message: str) -> None:
    global _complained
    if not _complained:
        _complained = True
        logger.warning("%s", message)


@cache
def _processor() -> str:
    return processor()


@cache
def _version() -> str:
    return version("pyvolconv")


@cache
def _digest() -> str:
    extension, _ = load_extension()
    return "none" if extension is None else sha256(Path(extension.__file__).read_bytes()).hexdigest()[:16]  # type: ignore[arg-type]
