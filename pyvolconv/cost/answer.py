"""The answer in words: why a 3-D CNN step takes longer than an LSTM step, and what each path takes away.

The identity that the answer rests on, with T the time of a training step, F its floating-point operations and
E = F / T the rate at which they were done:

    T_cnn / T_lstm  =  (F_cnn / F_lstm)  /  (E_cnn / E_lstm)
      time ratio          work ratio           rate ratio

F follows from how often a weight is used: a convolution weight once per voxel of its output, an LSTM weight once per
frame. The work ratio is a property of the two networks; only the rate ratio is the implementation's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from . import wording
from .breakdown import Pages, in_state
from .removal import PARTS, Removal, Row, as_installed, removals, rows_of_removal
from .results import BUSY, ComparisonResult, PathTiming

AS_INSTALLED = " (the allocator as installed)"
NOISE = 0.03
"""Share of a step's time below which a difference between two medians is the machine's, not the change's."""


@dataclass(frozen=True)
class Factors:
    """The identity's four numbers for one CNN path: time = work / rate; rates in GF/s."""

    path: str
    pages: Pages
    time_ratio: float
    work_ratio: float
    rate_ratio: float
    cnn_gflops: float
    lstm_gflops: float


@dataclass(frozen=True)
class Answer:
    """The report's first and last words, and the numbers that they rest on.

    `rows` lead step by step from torch as installed to all of our fastest backend, with the peers at their best at the
    end; `removals` are the differences of neighbours among them, so they add up; `other_paths` set each of our other
    backends against torch in the same layout.
    """

    headline: str
    paragraphs: list[str]
    factors: list[Factors]
    rows: list[Row]
    removals: list[Removal]
    other_paths: list[Removal]

    def to_dict(self) -> dict[str, Any]:
        """Words and numbers as plain values for JSON."""
        return {
            "headline": self.headline,
            "paragraphs": self.paragraphs,
            "factors": [asdict(item) for item in self.factors],
            "rows": [item.to_dict() for item in self.rows],
            "removals": [item.to_dict() for item in self.removals],
            "other_paths": [item.to_dict() for item in self.other_paths],
        }


def answer(result: ComparisonResult) -> Answer:
    """Put a result into words. What was not measured is left out, so a partial result has a shorter answer."""
    factors = [found for path, pages in _landmarks(result) if (found := factors_of(result, path, pages)) is not None]
    rows = rows_of_removal(result)
    taken = removals(rows)
    paragraphs = _paragraphs(result, factors, taken)
    return Answer(_headline(result), paragraphs, factors, rows, taken, _other_paths(result, rows))


def factors_of(result: ComparisonResult, path: PathTiming, pages: Pages) -> Factors | None:
    """The identity for one CNN path against the LSTM in the same allocator state; None when a side is missing."""
    lstm, cnn_facts, lstm_facts = result.lstm_step(pages), result.network("cnn"), result.network("lstm")
    if lstm is None or cnn_facts is None or lstm_facts is None:
        return None
    cnn_rate = cnn_facts.flops * path.batch_size / path.milliseconds / 1e6
    lstm_rate = lstm_facts.flops * lstm.batch_size / lstm.milliseconds / 1e6
    return Factors(
        path=path.path,
        pages=pages,
        time_ratio=path.milliseconds / lstm.milliseconds,
        work_ratio=cnn_facts.flops / lstm_facts.flops,
        rate_ratio=cnn_rate / lstm_rate,
        cnn_gflops=cnn_rate,
        lstm_gflops=lstm_rate,
    )


def _landmarks(result: ComparisonResult) -> list[tuple[PathTiming, Pages]]:
    candidates: list[tuple[PathTiming | None, Pages]] = [
        (as_installed(result), result.before),
        (result.best(result.after, ours=False), result.after),
        (result.best(result.after, ours=True), result.after),
    ]
    found: list[tuple[PathTiming, Pages]] = []
    for timing, pages in candidates:
        # On a GPU torch as installed may be torch at its best.
        if timing is not None and (timing, pages) not in found:
            found.append((timing, pages))
    return found


def _headline(result: ComparisonResult) -> str:
    torch_default, ours = as_installed(result), result.best(result.after, ours=True)
    torch_best = result.best(result.after, ours=False)
    lstm_default, lstm_kept = result.lstm_step(result.before), result.lstm_step(result.after)
    if torch_default is None or lstm_default is None:
        return "The run ended before torch's CNN and the LSTM were both timed, so there is no answer yet."
    start = wording.ratio(torch_default.milliseconds / lstm_default.milliseconds)
    gpu = torch_default.pages == "cached"
    who = "torch in its usual layout" if gpu else "torch as installed"
    sentence = f"With {who}, a training step of the 3D CNN takes {start} as long as one of the LSTM"
    if any(note.startswith(BUSY) for note in result.notes):
        sentence = f"Measured on a busy machine: run it again on a quiet one before you rely on it. {sentence}"
    if ours is None:
        return f"{sentence}. No path of pyvolconv was timed; the notes say why."
    if lstm_kept is None:
        return sentence + "."
    pages = ", with pages kept for both," if result.after == "kept" and result.before != "kept" else ""
    return (
        f"{sentence}. With pyvolconv{pages} it takes {wording.ratio(ours.milliseconds / lstm_kept.milliseconds)}: "
        f"{wording.milliseconds(ours.milliseconds)} instead of {wording.milliseconds(torch_default.milliseconds)}, "
        f"{_faster(torch_default.milliseconds / ours.milliseconds)}{_against_best(torch_default, torch_best, ours)}."
    )


def _against_best(installed: PathTiming, best: PathTiming | None, ours: PathTiming) -> str:
    """Torch's best layout in the allocator state of ours, where that is another step than the one as installed."""
    if best is None or best is installed:
        return ""
    return (
        f", and {_faster(best.milliseconds / ours.milliseconds)} than torch at its best "
        f"({wording.milliseconds(best.milliseconds)}: {best.path.removeprefix('torch ')}{in_state(best.pages)})"
    )


def _paragraphs(result: ComparisonResult, factors: list[Factors], taken: list[Removal]) -> list[str]:
    paragraphs = [text for text in (_work(result),) if text]
    paragraphs += [_identity(item) for item in factors]
    paragraphs += [_removal(item) for item in taken]
    return paragraphs


def _work(result: ComparisonResult) -> str:
    cnn, lstm = result.network("cnn"), result.network("lstm")
    if cnn is None or lstm is None:
        return ""
    return (
        f"The CNN has {wording.ratio(cnn.parameters / lstm.parameters)} the weights of the LSTM "
        f"({wording.count(cnn.parameters)} against {wording.count(lstm.parameters)}) but "
        f"{_times(cnn.flops / lstm.flops)} the arithmetic: a convolution uses each weight once per voxel, on average "
        f"{wording.count(cnn.weight_uses)} times per sample over all of the CNN's weights; the LSTM uses each weight "
        f"once per frame, on average {wording.significant(lstm.weight_uses)} times. No implementation of these two "
        "networks changes that factor, short of computing the same sums with fewer multiplications, or leaving out "
        "those with zeros, as ours partly do."
    )


def _identity(item: Factors) -> str:
    return (
        f"{item.path}{in_state(item.pages)}{AS_INSTALLED if item.pages == 'returned' else ''}: "
        f"{wording.ratio(item.time_ratio)} the time = "
        f"{wording.ratio(item.work_ratio)} the work ÷ {wording.ratio(item.rate_ratio)} the rate. "
        f"The CNN's arithmetic runs at {wording.significant(item.cnn_gflops)} GF/s, "
        f"the LSTM's at {wording.significant(item.lstm_gflops)} GF/s."
    )


def _removal(item: Removal) -> str:
    if abs(item.milliseconds) < NOISE * item.before.milliseconds:
        before, after = (wording.milliseconds(step.milliseconds) for step in (item.before, item.after))
        return f"{item.change} makes no difference beyond the noise: {after} after {before}."
    verb, of = ("takes away", "of") if item.milliseconds >= 0 else ("adds", "to")
    sign = 1 if item.milliseconds >= 0 else -1
    largest = max(item.parts, key=lambda part: sign * item.parts[part], default=None)
    text = (
        f"{item.change} {verb} {wording.milliseconds(abs(item.milliseconds))} {of} "
        f"{wording.milliseconds(item.before.milliseconds)}"
    )
    if largest is None:
        return text + "."
    return f"{text}; the largest part in {PARTS[largest]} ({wording.milliseconds(abs(item.parts[largest]))})."


def _other_paths(result: ComparisonResult, rows: list[Row]) -> list[Removal]:
    shown = {row.timing.path for row in rows}
    found = []
    for timing in result.cnn_paths(result.after):
        peers = [one for one in result.cnn_paths(result.after) if not one.ours and _comparable(one, timing)]
        if timing.ours and timing.path not in shown and peers:
            change = f"{timing.path} instead of {peers[0].path}"
            found.append(Removal.of(change, peers[0], timing))
    return found


def _comparable(one: PathTiming, other: PathTiming) -> bool:
    """Whether two steps have the same memory layout, are launched alike, and both may round to TF32, or neither."""

    def kind(timing: PathTiming) -> tuple[str | None, bool, bool]:
        return timing.layout, timing.graph, timing.tf32 is not False

    return kind(one) == kind(other)


def _times(value: float) -> str:
    return f"{wording.significant(value)} times"


def _faster(speed_up: float) -> str:
    return f"{wording.ratio(speed_up)} faster" if speed_up >= 1 else f"{wording.ratio(1 / speed_up)} slower"
