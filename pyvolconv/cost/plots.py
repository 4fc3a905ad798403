"""The report's plots.

Each plot is drawn twice, for a light and for a dark page, with a transparent background. A plot whose numbers were
not measured is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from . import wording
from .breakdown import LayerRow, in_state
from .machine import Machine
from .palette import DPI, PASS_COLOURS, THEMES, Theme, pass_colour, style
from .removal import PARTS
from .results import PAGES, ComparisonResult, PathTiming, TrainingRun

WIDTH = 8.0
SMALL = 0.01
SMALLER = "smaller items"
CLIP = 1.25
"""Bars longer than this many times torch's contiguous step are cut off and labelled with their length."""


def write_plots(result: ComparisonResult, folder: Path) -> dict[str, dict[str, Path]]:
    """Draw every plot whose numbers exist.

    Returns:
        {"accuracy" | "paths" | "layers" | "roofline": {"light" | "dark": PNG file in `folder`}}.
    """
    drawn: dict[str, dict[str, Path]] = {}
    for name, plot in PLOTS.items():
        for theme_name, theme in THEMES.items():
            with style(theme):
                figure = plot(result, theme)
                if figure is None:
                    break
                path = folder / (f"{name}.png" if theme_name == "light" else f"{name}-dark.png")
                FigureCanvasAgg(figure)
                figure.savefig(path, format="png")
                drawn.setdefault(name, {})[theme_name] = path
    return drawn


def accuracy(result: ComparisonResult, theme: Theme) -> Figure | None:
    """Validation accuracy over wall-clock, one curve per training run, with the accuracy aimed for."""
    runs = [run for run in result.training if run.epochs]
    if not runs:
        return None
    figure = Figure(figsize=(WIDTH, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for run in runs:
        colour = _run_colour(run, theme)
        times = [epoch.seconds for epoch in run.epochs]
        axes.plot(
            times, [epoch.validation_accuracy for epoch in run.epochs], color=colour, linewidth=2, label=run.label
        )
        axes.plot(*_projected_curve(run, result), color=colour, linewidth=1.5, linestyle=(0, (2, 2)))
        if run.seconds_to_target is not None:
            axes.plot([run.seconds_to_target], [run.target], "o", color=colour, markersize=7)
    target = runs[0].target
    axes.axhline(target, color=theme["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlim(left=0)
    axes.set_ylim(top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("wall-clock, s")
    axes.set_ylabel("validation accuracy")
    axes.legend(loc="lower right", labelcolor="linecolor", handlelength=1.2)
    return figure


def paths(result: ComparisonResult, theme: Theme) -> Figure | None:
    """One bar per path and allocator state, stacked by pass, the LSTM's step beside them."""
    groups = {pages: timings for pages in PAGES if (timings := result.timings(pages))}
    every = [timing for timings in groups.values() for timing in timings]
    if not any(timing.network == "cnn" for timing in every):
        return None
    torch_steps = [timing.milliseconds for timing in every if timing.network == "cnn" and not timing.ours]
    limit = CLIP * max(torch_steps or [timing.milliseconds for timing in every])
    height = 1.0 + 0.28 * len(every) + 0.4 * len(groups)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    ratios = [len(timings) + 0.6 for timings in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axes, (pages, timings) in zip(panels, groups.items(), strict=True):
        for position, timing in enumerate(timings):
            _path_bar(axes, position, timing, limit, theme)
        axes.set_yticks(range(len(timings)), [_path_name(timing) for timing in timings])
        axes.set_ylim(len(timings) - 0.4, -0.6)
        axes.set_xlim(0, limit * 1.14)
        _horizontal(axes)
        axes.set_title(in_state(pages).removeprefix(", ").capitalize(), fontsize=10)
    panels[-1].set_xlabel("ms per training step" + (" (* scaled up from fewer samples)" if _any_scaled(every) else ""))
    _legend(figure, {label: PASS_COLOURS[label] for label in PARTS.values()})
    return figure


def layers(result: ComparisonResult, theme: Theme) -> Figure | None:
    """Where the CNN's step goes: one row per layer, stacked by pass, one panel per path, all on one scale."""
    shown = {found.title.replace(", pages ", "\npages "): found.rows() for found in result.shown_profiles()}
    if not shown:
        return None
    bars = {title: _bars(rows) for title, rows in shown.items()}
    names = _fold_small(bars)
    figure = Figure(figsize=(WIDTH, 1.6 + 0.28 * len(names)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    longest = 0.0
    for axes, (title, parts) in zip(panels, bars.items(), strict=True):
        for position, name in enumerate(names):
            left = 0.0
            for pass_, width in parts.get(name, []):
                axes.barh(position, width, left=left, height=0.66, color=pass_colour(pass_))
                left += width
            axes.text(left, position, f" {wording.significant(left)}", va="center", fontsize=8, color=theme["muted"])
            longest = max(longest, left)
        total = sum(row.milliseconds for row in shown[title])
        axes.set_title(f"{title}: {wording.milliseconds(total)}", fontsize=10, linespacing=1.4)
        _horizontal(axes)
        axes.set_xlabel("ms per training step")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_xlim(0, longest * 1.16)
    panels[0].invert_yaxis()
    _legend(figure, PASS_COLOURS)
    return figure


def _bars(rows: list[LayerRow]) -> dict[str, list[tuple[str, float]]]:
    """Layer to its (pass, milliseconds), in the order of running."""
    bars: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        bars.setdefault(row.label, []).append((row.pass_, row.milliseconds))
    return bars


def _fold_small(panels: dict[str, dict[str, list[tuple[str, float]]]]) -> list[str]:
    """Put the layers that are small in every panel together, in place; the names that remain, in order."""
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    longest = max(_length(bars, name) for bars in panels.values() for name in bars)
    small = [name for name in names if all(_length(bars, name) < SMALL * longest for bars in panels.values())]
    for bars in panels.values():
        folded = sum(_length(bars, name) for name in small)
        for name in small:
            bars.pop(name, None)
        if small:
            bars[SMALLER] = [("other", folded)]
    return [name for name in names if name not in small] + ([SMALLER] if small else [])


def _length(bars: dict[str, list[tuple[str, float]]], name: str) -> float:
    return sum(width for _, width in bars.get(name, []))


def roofline(result: ComparisonResult, theme: Theme) -> Figure | None:
    """GF/s over arithmetic intensity for each pass of each convolution, under the measured roof."""
    machine = result.machine
    points = [
        (found, [row for row in found.rows() if row.kind == "conv" and row.gflops_per_second and row.bytes])
        for found in result.shown_profiles()
    ]
    every = [row for _, rows in points for row in rows]
    if machine is None or not every:
        return None
    figure = Figure(figsize=(WIDTH, 4.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for found, rows in points:
        for row in rows:
            colour = pass_colour(row.pass_)
            axes.plot(
                row.flops / row.bytes,
                row.gflops_per_second or math.nan,
                "o" if found.ours else "s",
                color=colour,
                markerfacecolor=colour if found.ours else "none",
                markeredgewidth=1.6,
                markersize=8,
            )
    _draw_roof(axes, machine, every, theme)
    _label_layers(axes, every, theme)
    axes.set_xlabel("arithmetic intensity, FLOP per byte that must move")
    axes.set_ylabel("GF/s")
    words = [f"{'filled circle' if found.ours else 'hollow square'}: {found.title}" for found, _ in points]
    axes.set_title("; ".join(words), fontsize=10, color=theme["muted"], fontweight="normal")
    _legend(figure, {name: PASS_COLOURS[name] for name in ("forward", "grad_input", "grad_weight")})
    return figure


PLOTS: dict[str, Callable[[ComparisonResult, Theme], Figure | None]] = {
    "accuracy": accuracy,
    "paths": paths,
    "layers": layers,
    "roofline": roofline,
}


def _horizontal(axes: Axes) -> None:
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1, handleheight=1)


def _run_colour(run: TrainingRun, theme: Theme) -> str:
    return theme["lstm"] if run.network == "lstm" else theme["ours" if run.ours else "torch"]


def _projected_curve(run: TrainingRun, result: ComparisonResult) -> tuple[list[float], list[float]]:
    """The epochs that a run cut short did not reach: accuracies of the complete run, seconds at its own pace."""
    pace = run.seconds_per_epoch
    complete = next((other for other in result.training if other.network == run.network and other is not run), None)
    if not run.projected or complete is None or pace is None:
        return [], []
    last = run.epochs[-1]
    later = [epoch for epoch in complete.epochs if epoch.number > last.number]
    return (
        [last.seconds, *(last.seconds + pace * (epoch.number - last.number) for epoch in later)],
        [last.validation_accuracy, *(epoch.validation_accuracy for epoch in later)],
    )


def _path_bar(axes: Axes, position: int, timing: PathTiming, limit: float, theme: Theme) -> None:
    left = 0.0
    for part, label in PARTS.items():
        width = getattr(timing, part)
        if width is None:
            continue
        shown = min(width, max(limit - left, 0.0))
        axes.barh(position, shown, left=left, height=0.66, color=PASS_COLOURS[label])
        left += shown
    if timing.forward is None:
        left = min(timing.milliseconds, limit)
        axes.barh(position, left, height=0.66, color=theme["lstm"])
    cut = " →" if timing.milliseconds > limit else ""
    text = f"{cut} {wording.milliseconds(timing.milliseconds)}"
    axes.text(left, position, text, va="center", fontsize=8.5, color=theme["ink"])


def _any_scaled(timings: list[PathTiming]) -> bool:
    return any(timing.scaled for timing in timings)


def _path_name(timing: PathTiming) -> str:
    return f"{timing.path} *" if timing.scaled else timing.path


def _draw_roof(axes: Axes, machine: Machine, rows: list[LayerRow], theme: Theme) -> None:
    peak, bandwidth = machine.peak_flops / 1e9, machine.copy_bandwidth / 1e9
    ridge = peak / bandwidth
    intensities = [row.flops / row.bytes for row in rows]
    low, high = min(*intensities, ridge) / 1.8, max(*intensities, ridge) * 2
    axes.plot([low, ridge, high], [bandwidth * low, peak, peak], color=theme["muted"], linewidth=1.6, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    rates = [row.gflops_per_second or peak for row in rows]
    axes.set_xlim(low, high)
    axes.set_ylim(min(*rates, bandwidth * low) / 1.6, max(*rates, peak) * 1.9)
    roof = f"{machine.peak_name} {wording.significant(peak)} GF/s"
    axes.text(ridge * 1.1, peak * 1.06, roof, va="bottom", fontsize=8.5, color=theme["muted"])
    slope = f"copy bandwidth {wording.significant(bandwidth)} GB/s"
    middle = math.sqrt(low * ridge)
    axes.annotate(
        slope,
        (middle, bandwidth * middle),
        textcoords="offset points",
        xytext=(4, -12),
        fontsize=8.5,
        color=theme["muted"],
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _label_layers(axes: Axes, rows: list[LayerRow], theme: Theme) -> None:
    """Name each layer once, above its highest point: its three passes have nearly the same intensity."""
    for label in dict.fromkeys(row.label for row in rows):
        highest = max((row for row in rows if row.label == label), key=lambda row: row.gflops_per_second or 0.0)
        axes.annotate(
            label,
            (highest.flops / highest.bytes, highest.gflops_per_second or 0.0),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=9,
            color=theme["ink"],
        )
