"""The report of a comparison: `report.html` (self-contained), its plots as PNG files, and `results.json`."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from . import wording
from .answer import Answer, answer
from .breakdown import LayerRow, Pages, PathProfile, in_state
from .plots import write_plots
from .removal import as_installed
from .results import PAGES, TARGET_ACCURACY, ComparisonResult, PathTiming

PAGES_WORDS = {
    "returned": (
        "The C allocator as installed: it gives large freed buffers back to the system and faults fresh pages in "
        "again at every step."
    ),
    "kept": "The allocator told to keep freed buffers for the next step, for torch and for ours alike.",
    "cached": "On the GPU; torch's caching allocator keeps freed buffers for the next step, for all paths alike.",
}

MEMORY_WORDS = (
    "Memory: what a step adds to the resident process at its peak, activations and work space together, beyond weights "
    "and data. It was measured with pages returned; with pages kept, the process holds that much between steps too."
)
GPU_MEMORY_WORDS = (
    "Memory: what a step adds at its peak to what torch has allocated on the GPU, activations and work space together, "
    "beyond weights and data."
)
NOT_QUEUED = "The GPU's queue did not hold the whole step, so that times may include waiting for the host."
TF32_WORDS = (
    "Float32 convolutions may round their operands to TF32 (10 bits of fraction), which is torch's default on a GPU, "
    'except in paths named "tf32 off"; their gradients are nearer to float64\'s. Torch had cuDNN time its algorithms '
    "first (torch.backends.cudnn.benchmark) in every path."
)
GRAPH_WORDS = (
    'Paths named "graph" launch the whole step, Adam included, as one CUDA graph: what is left is the GPU\'s own time. '
    "Their passes are those of the same path without a graph."
)


@dataclass(frozen=True)
class Card:
    """One key figure at the top of the report."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class PathRow:
    """One path's step beside torch's and the LSTM's of the same allocator state."""

    timing: PathTiming
    speed_up: float | None
    to_lstm: float | None


@dataclass(frozen=True)
class ProfileTable:
    """One profiled step as a table."""

    title: str
    batch_size: int
    rows: list[LayerRow]
    with_faults: bool
    queued: bool

    @classmethod
    def of(cls, profile: PathProfile) -> ProfileTable:
        """The table of a profile."""
        return cls(
            profile.title, profile.batch_size, profile.main_rows(), profile.pages != "cached", profile.profile.queued
        )

    @property
    def total(self) -> float:
        """Milliseconds of all rows."""
        return sum(row.milliseconds for row in self.rows)

    @property
    def longest(self) -> float:
        """Milliseconds of the longest row."""
        return max(row.milliseconds for row in self.rows)

    @property
    def flops(self) -> float:
        """Operations of all rows."""
        return sum(row.flops for row in self.rows)

    @property
    def faults(self) -> float:
        """Page faults of all rows."""
        return sum(row.page_faults for row in self.rows)


def write_report(result: ComparisonResult, folder: Path) -> Path:
    """Write results.json, the plots and report.html into `folder`, which is created when it is missing.

    Returns:
        The path of report.html.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = answer(result)
    result.write_json(folder / "results.json", answer=words.to_dict())
    plots = write_plots(result, folder)
    page = folder / "report.html"
    page.write_text(render(result, words, plots), encoding="utf-8")
    return page


def render(result: ComparisonResult, words: Answer, plots: dict[str, dict[str, Path]]) -> str:
    """The page as one string; the plots' PNG files are embedded, nothing outside it is referred to."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=jinja2.select_autoescape(("html", "j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("significant", "milliseconds", "seconds", "ratio", "percent", "scaled", "count", "binary"):
        environment.filters[name] = getattr(wording, name)
    images = {name: {theme: _data_uri(path) for theme, path in themes.items()} for name, themes in plots.items()}
    return environment.get_template("report.html.j2").render(_context(result, words), images=images)


def path_rows(result: ComparisonResult) -> dict[Pages, list[PathRow]]:
    """For each allocator state that was measured: every path against torch contiguous and the LSTM of that state."""
    groups: dict[Pages, list[PathRow]] = {}
    for pages in PAGES:
        torch_step, lstm = result.timing("torch contiguous", pages), result.lstm_step(pages)
        torch_time = torch_step.milliseconds if torch_step else None
        lstm_time = lstm.milliseconds if lstm else None
        for timing in result.timings(pages):
            speed_up = wording.divide(torch_time, timing.milliseconds) if timing.network == "cnn" else None
            # The LSTM is no graph.
            to_lstm = None if timing.graph else wording.divide(timing.milliseconds, lstm_time)
            groups.setdefault(pages, []).append(PathRow(timing, speed_up, to_lstm))
    return groups


def cards(result: ComparisonResult) -> list[Card]:
    """The key figures, as far as they were measured."""
    before, after = result.before, result.after
    installed, lstm_installed = as_installed(result), result.lstm_step(before)
    ours, torch_best, lstm = result.best(after, ours=True), result.best(after, ours=False), result.lstm_step(after)
    found = []
    if installed and lstm_installed:
        value = wording.ratio(installed.milliseconds / lstm_installed.milliseconds)
        peer = "torch's usual layout" if before == "cached" else "torch as installed"
        found.append(Card(f"CNN over LSTM, {peer}", value, "time of a training step"))
    if ours and lstm:
        value = wording.ratio(ours.milliseconds / lstm.milliseconds)
        found.append(Card("CNN over LSTM, pyvolconv", value, ours.path + in_state(after)))
    if ours and installed:
        detail = f"{wording.milliseconds(installed.milliseconds)} → {wording.milliseconds(ours.milliseconds)}"
        peer = "torch contiguous" if before == "cached" else "torch as installed"
        found.append(_speed_card(peer, installed.milliseconds / ours.milliseconds, detail))
    if ours and torch_best:
        state = in_state(after)
        detail = f"{torch_best.path}{state} for both" if state else torch_best.path
        found.append(_speed_card("torch's best", torch_best.milliseconds / ours.milliseconds, detail))
    return found


def _speed_card(peer: str, speed_up: float, detail: str) -> Card:
    if speed_up < 1:
        return Card(f"Slower than {peer}", wording.ratio(1 / speed_up), detail)
    return Card(f"Faster than {peer}", wording.ratio(speed_up), detail)


def _context(result: ComparisonResult, words: Answer) -> dict[str, Any]:
    caches = result.machine.caches if result.machine else {}
    every = [row.timing for rows in path_rows(result).values() for row in rows]
    profiles = [ProfileTable.of(found) for found in result.profiles]
    return {
        "result": result,
        "answer": words,
        "cards": cards(result),
        "groups": path_rows(result),
        "pages_words": PAGES_WORDS,
        "measured_memory": {timing.pages for timing in every if timing.memory_bytes is not None},
        "profiles": profiles,
        "in_state": in_state,
        "not_queued": NOT_QUEUED,
        "gpu": on_gpu(result),
        "estimated": any(row.share_estimated for table in profiles for row in table.rows),
        "path_notes": path_notes(result),
        "batch_words": f"One training step on {every[0].batch_size} samples." if every else "",
        "target": result.training[0].target if result.training else TARGET_ACCURACY,
        "caches": ", ".join(f"{name} {wording.binary(size)}" for name, size in caches.items() if name != "L1i"),
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "sections": ", ".join(f"{name} {wording.seconds(spent)}" for name, spent in result.sections.items()),
        "settings": ", ".join(f"{name} {value}" for name, value in result.settings.items() if value is not None),
    }


def on_gpu(result: ComparisonResult) -> bool:
    """Whether the steps were timed on a GPU."""
    return result.after == "cached"


def path_notes(result: ComparisonResult) -> list[str]:
    """What a reader of the path table must know: paths scaled up, how near the gradients are, paths left out."""
    notes = []
    scaled = {timing.path: timing for timing in result.paths if timing.scaled}
    if scaled:
        names = ", ".join(f"{timing.path} ({timing.samples} of {timing.batch_size})" for timing in scaled.values())
        notes.append(f"* Too slow here for whole batches, so timed on a few samples and scaled up: {names}.")
    differences = {t.path: t.gradient_difference for t in result.paths if t.gradient_difference is not None}
    if differences:
        words = ", ".join(f"{path} {difference:.1e}" for path, difference in differences.items())
        notes.append(f"Relative difference of all parameter gradients to torch's in float64: {words}.")
    if any(timing.tf32 is not None for timing in result.paths):
        notes.append(TF32_WORDS)
    if any(timing.graph for timing in result.paths):
        notes.append(GRAPH_WORDS)
    if any(timing.memory_bytes is not None for timing in result.paths):
        notes.append(GPU_MEMORY_WORDS if on_gpu(result) else MEMORY_WORDS)
    return notes + [f"{path} was left out: {reason}" for path, reason in result.unavailable.items()]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
