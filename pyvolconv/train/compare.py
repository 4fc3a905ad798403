"""`pyvolconv compare`: the 3-D CNN and the LSTM on the same volumes, every path timed, all inside a time budget.

The order of the sections is a contract. "Pages returned" is measured in the process as it started, before anything
touches the C allocator; then `keep_pages()` is switched on and everything after it, training included, runs with pages
kept. A Ctrl-C anywhere leaves a result that holds what was measured until then.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..cost import busy
from ..cost.breakdown import Pages
from ..cost.machine import Machine, measure_machine, versions
from ..cost.pages import keep_pages, pages_kept
from ..cost.results import ComparisonResult, DataFacts, PathTiming, TrainingRun
from ..cost.timing import now
from ..dispatch import backends
from ..problem import Layout
from .checkpoint import CheckpointError
from .data import Splits, batches, frame_average_accuracy
from .description import DIGITS_WORDS, describe
from .digits import moving_digits
from .loop import TrainConfig
from .models import NetworkName, build
from .npz import load_npz
from .paths import Need, fuses, our_paths
from .plan import FULL, LSTM_SHARE, OURS_SHARE, QUICK, QUICK_VIDEOS, Settings
from .runs import Trainer, projected
from .steps import LSTM_PATH, TORCH_PATHS, Candidate, PathSpec, time_paths
from .trials import fitted, gradient_difference


def compare(settings: Settings, console: Console) -> ComparisonResult:
    """Measure everything, or as much as there is time for before Ctrl-C.

    A checkpoint that cannot be written or continued ends the training, not the comparison: `result.error` says so.

    Args:
        settings: what was asked for.
        console: where progress is drawn.

    Raises:
        DataError: the user's volumes cannot be used.
        ValueError: a path was asked for that does not exist.
    """
    comparison = _Comparison(settings, console)
    with comparison.kept_pages:
        try:
            comparison.run()
        except KeyboardInterrupt:
            comparison.update(interrupted=True)
    return comparison.result


class _Comparison:
    """The result as it grows, and what the sections hand to each other."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.began = time.perf_counter()
        self.budget = QUICK if settings.quick else FULL
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
            candidates = self._candidates(data, x, y, self._paths(chosen, needs))
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
        with self._saying("Reading the volumes" if settings.data else "Drawing the moving digits"):
            if settings.data:
                data = load_npz(settings.data, settings.seed)
            else:
                data = (
                    moving_digits(*QUICK_VIDEOS, settings.seed) if settings.quick else moving_digits(seed=settings.seed)
                )
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
        with self._saying("Measuring FMA peak and copy bandwidth"):
            machine = measure_machine("cuda" if self.settings.device == "cuda" else "cpu")
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
        if self.settings.device == "cuda" or pages_kept():
            self._time_in_state(candidates, "kept", machine)
            return
        self._time_in_state(candidates, "returned", machine)
        kept = self.kept_pages.enter_context(keep_pages())
        if kept.active:
            self._time_in_state(candidates, "kept", machine)
        else:
            self._note(f"Pages could not be kept here: {kept.reason}.")

    @staticmethod
    def _paths(chosen: dict[str, list[Layout]], needs: list[Need]) -> list[list[PathSpec]]:
        """The CNN's paths in the order of the report, each in the layouts that it runs in."""
        specs = [[PathSpec(path, "cnn", None, layout)] for path, layout in TORCH_PATHS.items()]
        for name, layouts in chosen.items():
            specs.append([PathSpec(name, "cnn", name, layout) for layout in layouts])
            fused = [layout for layout in layouts if fuses(name, needs, layout)]
            # The readable reference is too slow to be worth more rows.
            if fused and all(backend.automatic for backend in backends() if name in (backend.name, backend.family)):
                dense = f"{name} fused, dense backward"
                specs.append([PathSpec(dense, "cnn", name, layout, True, True) for layout in fused])
                specs.append([PathSpec(f"{name} fused", "cnn", name, layout, True) for layout in fused])
        return specs

    def _candidates(self, data: Splits, x: Tensor, y: Tensor, specs: list[list[PathSpec]]) -> list[Candidate]:
        """One candidate per path, in the better layout; their gradients are compared with float64's on the way.

        The peers are tried first: when the time is over, paths of ours are left out, and the report says which.
        """
        longest = self.budget.longest_step(len(specs))
        seed, size, classes = self.settings.seed, data.input_size, data.classes
        until = now() + self.budget.trying

        def make_cnn() -> torch.nn.Module:
            return build("cnn", size, classes, seed)

        found: list[Candidate] = []
        with self._saying(f"Trying {LSTM_PATH}") as say:
            spec = PathSpec(LSTM_PATH, "lstm", None, None)
            lstm = fitted([spec], lambda: build(self._lstm, size, classes, seed), x, y, longest)
            for several in specs:
                path = several[0].path
                if several[0].ours and now() >= until:
                    self._leave_out(path)
                    continue
                say(f"Trying {path}")
                one = fitted(several, make_cnn, x, y, longest, until)
                found.append(one)
                self.differences[path] = gradient_difference(one, make_cnn, x, y)
                if one.untried:
                    self._note(f"{path} was tried in {one.spec.layout} only: {self._time_was_over()}.")
        return [*found, lstm]

    def _leave_out(self, path: str) -> None:
        self.update(unavailable={**self.result.unavailable, path: self._time_was_over()})

    def _time_was_over(self) -> str:
        return f"the {self.budget.trying:g} s for trying paths were over, which happens on a busy machine"

    def _time_in_state(self, candidates: list[Candidate], pages: Pages, machine: Machine) -> None:
        with self._saying(f"Timing every path, pages {pages}") as say:
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
            with self._saying("Fitting a linear model to the average frames"):
                accuracy = frame_average_accuracy(data)
            self.update(data=replace(self.result.data, frame_average_accuracy=accuracy))

    def _train(self, data: Splits, steps: dict[str, PathSpec]) -> None:
        settings, pages = self.settings, self.result.after
        unlimited = settings.epochs is not None
        config = TrainConfig(
            batch_size=settings.batch_size, learning_rate=settings.chosen_learning_rate, seed=settings.seed
        )
        trainer = Trainer(
            data=data,
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
            run, stopped = trainer.run(name, steps[timing.path], label.format(path=timing.path), seconds)
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
            load = busy.disturbance(before, busy.sample(), torch.get_num_threads())
            if load:
                self._note(
                    f"Other processes kept {load.others:.1f} of {load.cores} cores busy while {what}: "
                    "times are longer than on a quiet machine, and ratios less certain."
                )

    @contextmanager
    def _saying(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show what is going on; the value changes the words."""
        with self.console.status(text) as status:
            yield status.update
