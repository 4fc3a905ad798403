"""The file of measured times: JSON that people can read, safe against what several processes do to it at once.

    {"format": 1,
     "measured": [{"setting": {"processor": "...", "isa": "avx2", "threads": 2, ...},
                   "milliseconds": {PROBLEM: {PASS: {BACKEND: 1.25, ...}, ...}, ...}}, ...]}

BACKEND is a name, or "name@configuration" where its kernels were launched in another way than the backend's own.

Writers take turns by a lock on a file beside it; each reads what is there, adds to it, and replaces the file as a
whole. So nobody's times are lost, and a reader, who needs no lock, never sees half of a file.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from .problem import PASSES

FORMAT = 1
MOST_SETTINGS = 64
LOCK_SECONDS = 10.0

Table = dict[str, dict[str, dict[str, float]]]
"""Problem, pass and backend -> milliseconds, each by its name."""


@dataclass(frozen=True)
class Setting:
    """All that measured times depend on besides the problem.

    Attributes:
        processor: model name of the processor, or of the GPU where that computes.
        isa: the instruction set that the compiled kernels use.
        threads: of `torch.get_num_threads()`.
        precision: of `pyvolconv.set_precision`, and whether float32 may be computed in bfloat16 or, on a GPU, in TF32.
        pyvolconv, torch: versions.
        extension: digest of the compiled kernels; on a GPU, of the sources of those in Python.
    """

    processor: str
    isa: str
    threads: int
    precision: str
    pyvolconv: str
    torch: str
    extension: str

    def has_builds_of(self, other: Setting) -> bool:
        """Whether both were measured with the same versions."""
        return (self.pyvolconv, self.torch, self.extension) == (other.pyvolconv, other.torch, other.extension)


def read(path: Path) -> dict[Setting, Table]:
    """What the file holds, least recently added to first; empty without a file.

    Raises:
        OSError: it cannot be read.
        ValueError: what it holds is not of the form above.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        return {_setting(entry["setting"]): _table(entry["milliseconds"]) for entry in _entries(json.loads(text))}
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not of this form: {error!r}") from error


def add(path: Path, setting: Setting, table: Table) -> None:
    """Put the times of `table` into the file, over older ones of the same setting, problem and pass.

    A file that is not of the form above is replaced.

    Raises:
        OSError: the file cannot be read or written, or another process holds the lock for ten seconds (TimeoutError).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        try:
            tables = read(path)
        except ValueError:
            tables = {}
        merged = tables.pop(setting, {})
        for problem, passes in table.items():
            merged[problem] = merged.get(problem, {}) | passes
        tables[setting] = merged
        _replace(path, dict(list(tables.items())[-MOST_SETTINGS:]))


def _replace(path: Path, tables: Mapping[Setting, Table]) -> None:
    measured = [{"setting": asdict(setting), "milliseconds": table} for setting, table in tables.items()]
    whole = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        whole.write_text(json.dumps({"format": FORMAT, "measured": measured}, indent=1), encoding="utf-8")
        os.replace(whole, path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        try:
            import fcntl
        except ImportError:
            # Windows: without a lock two writers may lose one another's newest times, but never more.
            yield
            return
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {path} for {LOCK_SECONDS:.0f} s") from None
                time.sleep(0.01)
        yield


def _entries(content: Any) -> list[Any]:
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
    if not isinstance(content["measured"], list):
        raise TypeError("measured is no list")
    return content["measured"]


def _setting(values: Mapping[str, Any]) -> Setting:
    kinds = get_type_hints(Setting)
    if any(type(values[field.name]) is not kinds[field.name] for field in fields(Setting)):
        raise TypeError(f"setting {values}")
    return Setting(**{field.name: values[field.name] for field in fields(Setting)})


def _table(problems: Mapping[str, Any]) -> Table:
    table: Table = {}
    for problem, passes in problems.items():
        for pass_, times in passes.items():
            if pass_ not in PASSES or not times or not all(_is_time(time) for time in times.values()):
                raise TypeError(f"{pass_} of {problem}: {times}")
            table.setdefault(problem, {})[pass_] = {str(name): float(time) for name, time in times.items()}
    return table


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
