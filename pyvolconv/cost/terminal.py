"""The comparison on a terminal: the same numbers as the report, in short."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import wording
from .answer import answer
from .breakdown import LayerRow, Pages, PathProfile, in_state
from .profiler import StepProfile
from .removal import PARTS, Row
from .report import NOT_QUEUED, path_notes, path_rows
from .results import ComparisonResult, TrainingRun

WIDE, WIDEST = 114, 124
"""Columns of a terminal from which on tables are shown with what they are split into, and with memory."""


def print_result(console: Console, result: ComparisonResult) -> None:
    """Print machine, training runs, what each change removes, paths and the answer, as far as they were measured."""
    if result.machine:
        console.print(machine_line(result))
    for note in result.notes:
        console.print(Text(note, style="yellow"))
    if result.training:
        console.print(training_table(result))
        console.print()
    words = answer(result)
    if words.rows:
        console.print(removal_table(words.rows))
        for row in words.rows:
            if row.timing.ours:
                console.print(Text(f"{row.name}: {row.meaning}", style="dim"))
        console.print()
    for pages in path_rows(result):
        console.print(path_table(result, pages, console.width))
        console.print()
    for note in path_notes(result):
        console.print(Text(note, style="dim"))
    body = "\n\n".join([words.headline, *words.paragraphs])
    console.print(Panel(Text(body), title="The answer", title_align="left", border_style="blue", padding=(1, 2)))


def machine_line(result: ComparisonResult) -> Text:
    """One line: processor, instruction set, threads, both ceilings; of a GPU its name and ceilings."""
    machine = result.machine
    if machine is None:
        return Text("machine not measured", style="dim")
    copy = f" · copy {wording.significant(machine.copy_bandwidth / 1e9)} GB/s"
    if machine.device == "cuda":
        rates = (f"{name} {wording.significant(rate / 1e12)}" for name, rate in machine.matrix_rates.items())
        return Text.assemble((machine.name, "bold"), f" · matrix products, TF/s: {', '.join(rates)}{copy}")
    return Text.assemble(
        (machine.name, "bold"),
        f" · {machine.isa} · {machine.threads} threads"
        f" · FMA peak {wording.significant(machine.peak_flops / 1e9)} GF/s{copy}",
    )


def training_table(result: ComparisonResult) -> Table:
    """One row per training run."""
    target = wording.percent(result.training[0].target)
    table = _table("Training", "Run", ["Epochs", "Per epoch", f"To {target} validation", "Test"])
    table.columns[0].no_wrap = False
    for run in result.training:
        table.add_row(
            run.label,
            str(len(run.epochs)),
            wording.seconds(run.seconds_per_epoch),
            _to_target(run),
            wording.percent(run.test_accuracy, 1),
        )
    return table


def _to_target(run: TrainingRun) -> str:
    if run.epochs_to_target is not None:
        mark = " (projected)" if run.projected else ""
        return f"{run.epochs_to_target} epochs, {wording.seconds(run.seconds_to_target)}{mark}"
    if run.epochs:
        return f"not reached, best {wording.percent(max(epoch.validation_accuracy for epoch in run.epochs), 1)}"
    return "not one epoch finished"


def removal_table(rows: list[Row]) -> Table:
    """One row per change on the way from torch as installed, then the peers; where pages are kept, the name says so."""
    columns = ["Layout", "Step", "Removes", "vs installed", "vs LSTM", "Memory"]
    table = _table("What each change removes, ms per training step", "Path", columns)
    for row in rows:
        timing = row.timing
        table.add_row(
            row.name + (" *" if timing.scaled else ""),
            timing.layout or wording.NOT_MEASURED,
            Text(wording.significant(timing.milliseconds), style="bold"),
            wording.significant(row.removed),
            wording.ratio(row.speed_up),
            wording.ratio(row.to_lstm),
            wording.binary(row.memory_bytes),
            style="blue" if timing.ours else None,
        )
    return table


def path_table(result: ComparisonResult, pages: Pages, width: int = 120) -> Table:
    """One row per path in one allocator state, ms per training step; without the split where `width` is small."""
    parts = PARTS if width >= WIDE else {}
    rows = path_rows(result)[pages]
    columns = ["Layout", *parts.values(), "Step", "vs torch", "vs LSTM"]
    with_memory = width >= WIDEST and any(row.timing.memory_bytes is not None for row in rows)
    if with_memory:
        columns.append("Memory")
    state = in_state(pages).removeprefix(", ")
    table = _table("One training step, ms" + (f" ({state})" if state else ""), "Path", columns)
    for row in rows:
        timing = row.timing
        table.add_row(
            timing.path + (" *" if timing.scaled else ""),
            timing.layout or wording.NOT_MEASURED,
            *(wording.significant(getattr(timing, part)) for part in parts),
            Text(wording.significant(timing.milliseconds), style="bold"),
            wording.ratio(row.speed_up),
            wording.ratio(row.to_lstm),
            *([wording.binary(timing.memory_bytes)] if with_memory else []),
            style="blue" if timing.ours else None,
        )
    return table


def layer_table(profile: PathProfile, width: int = 120) -> Table:
    """One row per layer and pass of a profiled step, in the order of running; fewer columns where `width` is small."""
    left_out = {"Work", "Bytes", "Runs in"} if width < WIDE else set()
    if profile.pages == "cached":
        left_out.add("Faults")
    names = [name for name in LAYER_COLUMNS if name not in left_out]
    table = _table(f"{profile.title}, batch {profile.batch_size}", "Layer", names)
    rows = profile.main_rows()
    total = sum(row.milliseconds for row in rows)
    for row in rows:
        table.add_row(row.label, *(LAYER_COLUMNS[name](row, total) for name in names))
    table.add_section()
    table.add_row("Sum", "", wording.milliseconds(total))
    table.caption = _unprofiled(profile.profile)
    table.caption_justify = "left"
    return table


LAYER_COLUMNS: dict[str, Callable[[LayerRow, float], str]] = {
    "Pass": lambda row, _: row.pass_,
    "Time": lambda row, _: wording.milliseconds(row.milliseconds),
    "Share": lambda row, total: wording.percent(row.milliseconds / total, 1),
    "Work": lambda row, _: wording.scaled(row.flops or None, "FLOP"),
    "Bytes": lambda row, _: wording.scaled(row.bytes or None, "B"),
    "GF/s": lambda row, _: wording.significant(row.gflops_per_second),
    "Roofline": lambda row, _: wording.percent(row.roofline_share),
    "Faults": lambda row, _: wording.count(row.page_faults),
    "Runs in": lambda row, _: row.backend,
}


def _unprofiled(profile: StepProfile) -> str:
    text = f"The same step without the profiler: {wording.milliseconds(profile.step.median * 1e3)}"
    return text if profile.queued else f"{text}. {NOT_QUEUED}"


def _table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, 1))
    table.add_column(first, no_wrap=True)
    for column in columns:
        text = column in ("Layout", "Pass", "Runs in")
        table.add_column(column, justify="left" if text else "right", no_wrap=not text)
    return table
