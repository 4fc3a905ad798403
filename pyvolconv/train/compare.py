"""`pyvolconv compare`: the 3-D CNN and the LSTM on the same volumes, every path timed, all inside a time budget.

The order of the sections is a contract. "Pages returned" is measured in the process as it started, before anything
touches the C allocator; then `keep_pages()` is switched on and everything after it, training included, runs with pages
kept. A Ctrl-C anywhere leaves a result that holds what was measured until then.

On a GPU there is one allocator state, everything runs on the current device, and cuDNN times its algorithms first
(`torch.backends.cudnn.benchmark`), so that torch is at its best. Kernels of ours are compiled while paths are tried:
that takes tens of seconds when it happens for the first time, which no budget but its own pays for.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..cost import busy
from ..cost.breakdown import Pages, in_state
from ..cost.machine import Machine, measure_machine, versions
from ..cost.pages import keep_pages, pages_kept
from ..cost.results import BUSY, ComparisonResult, DataFacts, PathTiming, TrainingRun
from ..cost.timing import now
from ..status import log, status
from .checkpoint import CheckpointError
from .data import Splits, batches, frame_average_accuracy
from .description import DIGITS_WORDS, describe
from .digits import moving_digits
from .lineup import lineup
from .loop import TrainConfig
from .models import NetworkName, build
from .npz import load_npz
from .paths import Need, our_paths
from .plan import FULL, LSTM_SHARE, OURS_SHARE, QUICK, QUICK_VIDEOS, TRYING_ON_GPU, Settings
from .resident import resident
from .runs import Trainer, projected
from .steps import LSTM_PATH, Candidate, PathSpec, time_paths
from .trials import fitted, gradient_difference

COMPILING = " (kernels are compiled when they run for the first time on this machine: tens of seconds)"


def compare(settings: Settings, console: Console) -> ComparisonResult:
    """Measure everything, or as much as there is time for before Ctrl-C.

    A checkpoint that cannot be written or continued ends the training, not the comparison: `result.error` says so.

    Args:
        settings: what was asked for.
        console: where progress is drawn; if it is no terminal, lines on standard error say what is being done.

    Raises:
        DataError: the user's volumes cannot be used.
        ValueError: a path was asked for that does not exist.
    """
    comparison = _Comparison(settings, console)
    with comparison.kept_pages, _cudnn_at_its_best() if comparison.gpu else contextlib.nullcontext():
        try:
            comparison.run()
        except KeyboardInterrupt:
            comparison.update(interrupted=True)
    return comparison.result


@contextmanager
def _cudnn_at_its_best() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Comparison:
    """The result as it grows, and what the sections hand to each other."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.began = time.perf_counter()
        self.gpu = settings.device == "cuda"
        self.budget = QUICK if settings.quick else FULL
        if self.gpu:
            self.budget = replace(self.budget, trying=TRYING_ON_GPU)
        self.result = ComparisonResult(
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            versions=versions(),
            settings=settings.to_dict(),
        )
        self.differences: dict[str, float] = {}
        self.kept_pages = contextlib.ExitStack()

    def run(self) -> None:
        """Every section in order; a path that does not exist is found out before anything is measured."""
        our_paths(self.settings.backends, [])
        with self._section("volumes"):
            data = self._load_data()
        with self._section("machine"):
            machine = self._measure_machine()
        with self._section("networks"):
            needs = self._describe_networks(data)
            chosen, refused = our_paths(self.settings.backends, needs)
            if self.settings.backends and refused:
                name, why = next(iter(refused.items()))
                raise ValueError(f"--backends: {name} cannot run here: {why}")
            self.update(unavailable=refused)
        with self._section("trying paths"):
            x, y = self._batch(data)
            candidates = self._candidates(data, x, y, lineup(chosen, needs, self.settings.device))
        if self.gpu:
            # Most of it is compiling, and does not come again in the next run.
            self.began += self.result.sections["trying paths"]
        with self._section("steps"), self._watching_load("the steps were timed"):
            self._time_steps(candidates, machine)
        with self._section("difficulty"):
            self._judge_difficulty(data)
        with self._section("training"), self._watching_load("the networks were trained"):
            try:
                self._train(data, {one.spec.path: one.spec for one in candidates})
            except CheckpointError as error:
                self.update(error=str(error))

    def update(self, **changes: Any) -> None:
        """Add to the result."""
        self.result = replace(self.result, **changes)

    def _load_data(self) -> Splits:
        settings = self.settings
        with status(self.console, "Reading the volumes" if settings.data else "Drawing the moving digits"):
            if settings.data:
                data = load_npz(settings.data, settings.seed)
            else:
                # A GPU is quick with all of them.
                few = settings.quick and not self.gpu
                data = moving_digits(*QUICK_VIDEOS, settings.seed) if few else moving_digits(seed=settings.seed)
        self.update(
            data=DataFacts(
                source=data.name,
                description=f"Volumes of {data.name}." if settings.data else DIGITS_WORDS,
                shape=data.input_size,
                classes=data.classes,
                train=len(data.train),
                validation=len(data.validation),
                test=len(data.test),
            )
        )
        return data

    def _measure_machine(self) -> Machine:
        with status(self.console, f"Measuring {'matrix products' if self.gpu else 'FMA peak'} and copy bandwidth"):
            machine = measure_machine("cuda" if self.gpu else "cpu")
        self.update(machine=machine)
        return machine

    def _describe_networks(self, data: Splits) -> list[Need]:
        """Record both networks' work; the convolution passes that the CNN runs."""
        facts, needs = [], []
        for name in ("cnn", self._lstm):
            described, convolutions = describe(name, data, self._batch(data), self.settings.seed)
            facts.append(described)
            needs += convolutions
        self.update(networks=facts)
        return needs

    def _time_steps(self, candidates: list[Candidate], machine: Machine) -> None:
        """Time every path in both allocator states. Pages stay kept until the comparison ends."""
        if self.gpu or pages_kept():
            self._time_in_state(candidates, "cached" if self.gpu else "kept", machine)
            return
        self._time_in_state(candidates, "returned", machine)
        kept = self.kept_pages.enter_context(keep_pages())
        if kept.active:
            self._time_in_state(candidates, "kept", machine)
        else:
            self._note(f"Pages could not be kept here: {kept.reason}.")

    def _candidates(self, data: Splits, x: Tensor, y: Tensor, specs: list[list[PathSpec]]) -> list[Candidate]:
        """One candidate per path, in the better layout; their gradients are compared with float64's on the way.

        The peers are tried first, then what `accelerate` makes of the network: when the time is over, other paths of
        ours are left out, and the report says which.
        """
        longest = self.budget.longest_step(len(specs))
        seed, size, classes = self.settings.seed, data.input_size, data.classes
        until = now() + self.budget.trying

        def make_cnn() -> torch.nn.Module:
            return build("cnn", size, classes, seed)

        found: list[Candidate] = []
        with status(self.console, f"Trying {LSTM_PATH}") as say:
            spec = PathSpec(LSTM_PATH, "lstm", None, None)
            lstm = fitted([spec], lambda: build(self._lstm, size, classes, seed), x, y, longest)
            for several in sorted(specs, key=_urgency):
                path = several[0].path
                if several[0].ours and now() >= until:
                    self._leave_out(path)
                    continue
                say(f"Trying {path}" + (COMPILING if self.gpu and several[0].ours else ""))
                try:
                    one = fitted(several, make_cnn, x, y, longest, until)
                    self.differences[path] = gradient_difference(one, make_cnn, x, y)
                except RuntimeError as error:
                    if not (self.gpu and (several[0].ours or several[0].graph)) or self.settings.backends:
                        raise
                    # One kernel that this GPU's compiler refuses should not cost the whole comparison.
                    self.update(unavailable={**self.result.unavailable, path: f"it failed: {_first_line(error)}"})
                    continue
                found.append(one)
                if one.untried:
                    self._note(f"{path} was tried in {one.spec.layout} only: {self._time_was_over()}.")
        order = [several[0].path for several in specs]
        return [*sorted(found, key=lambda one: order.index(one.spec.path)), lstm]

    def _leave_out(self, path: str) -> None:
        self.update(unavailable={**self.result.unavailable, path: self._time_was_over()})

    def _time_was_over(self) -> str:
        return f"the {self.budget.trying:g} s for trying paths were over, which happens on a busy machine"

    def _time_in_state(self, candidates: list[Candidate], pages: Pages, machine: Machine) -> None:
        with status(self.console, f"Timing every path{in_state(pages)}") as say:
            timings, profiles = time_paths(
                candidates, pages, machine, seconds=self.budget.turns, repeats=self.budget.repeats, say=say
            )
        timings = [replace(timing, gradient_difference=self.differences.get(timing.path)) for timing in timings]
        self.update(paths=[*self.result.paths, *timings])
        shown = {best.path for ours in (False, True) if (best := self.result.best(pages, ours=ours))}
        if pages == self.result.before:
            shown.add("torch contiguous")
        self.update(profiles=[*self.result.profiles, *(found for found in profiles if found.path in shown)])

    def _judge_difficulty(self, data: Splits) -> None:
        """What a linear model makes of the embedded data's frame averages."""
        if self.settings.data is None and self.result.data is not None:
            with status(self.console, "Fitting a linear model to the average frames"):
                accuracy = frame_average_accuracy(data)
            self.update(data=replace(self.result.data, frame_average_accuracy=accuracy))

    def _train(self, data: Splits, steps: dict[str, PathSpec]) -> None:
        settings, pages = self.settings, self.result.after
        unlimited = settings.epochs is not None
        config = TrainConfig(
            batch_size=settings.batch_size, learning_rate=settings.chosen_learning_rate, seed=settings.seed
        )
        trainer = Trainer(
            data=resident(data, settings.device),
            config=replace(config, max_epochs=settings.epochs) if settings.epochs is not None else config,
            device=settings.device,
            pages=pages,
            folder=settings.out / "checkpoints",
            resume=settings.resume,
            console=self.console,
        )
        plan: list[tuple[NetworkName, str, PathTiming | None, float]] = [
            (self._lstm, "LSTM", self.result.lstm_step(pages), LSTM_SHARE),
            ("cnn", "CNN, ours ({path})", self.result.best(pages, ours=True), OURS_SHARE),
            ("cnn", "CNN, {path}", self.result.best(pages, ours=False), 1.0),
        ]
        complete: TrainingRun | None = None
        for name, label, timing, share in plan:
            if timing is None:
                continue
            left = self.budget.total - (time.perf_counter() - self.began)
            seconds = None if unlimited else max(1.0, share * left)
            label = label.format(path=timing.path)
            if not self.console.is_terminal:
                log(f"Training {label}" + (f", at most {seconds:.0f} s" if seconds is not None else ""))
            run, stopped = trainer.run(name, steps[timing.path], label, seconds)
            if timing.network == "cnn":
                run = projected(run, complete)
                complete = complete or run
            self.update(training=[*self.result.training, run])
            if stopped:
                raise KeyboardInterrupt

    @property
    def _lstm(self) -> NetworkName:
        return "bilstm" if self.settings.bidirectional else "lstm"

    def _batch(self, data: Splits) -> tuple[Tensor, Tensor]:
        x, y = next(iter(batches(data.train, self.settings.batch_size)))
        return x.to(self.settings.device), y.to(self.settings.device)

    def _note(self, text: str) -> None:
        self.update(notes=[*self.result.notes, text])

    @contextmanager
    def _section(self, name: str) -> Iterator[None]:
        """Keep how long a part took, also when Ctrl-C ends it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.update(sections={**self.result.sections, name: time.perf_counter() - began})

    @contextmanager
    def _watching_load(self, what: str) -> Iterator[None]:
        """Note it when other processes took cores from this one; on Linux, others do not tell."""
        before = busy.sample()
        try:
            yield
        finally:
            # A GPU's step is launched by one thread at a time.
            load = busy.disturbance(before, busy.sample(), 1 if self.gpu else torch.get_num_threads())
            if load:
                self._note(
                    f"{BUSY} {load.others:.1f} of {load.cores} cores busy while {what}: "
                    "times are longer than on a quiet machine, and ratios less certain."
                )


def _urgency(several: list[PathSpec]) -> tuple[bool, bool, bool]:
    """By which paths are tried: torch's, ours in one pass, and the steps between."""
    spec = several[0]
    return spec.ours, not spec.fused, spec.dense_backward


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
