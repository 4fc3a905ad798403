"""Measured choice: every backend that can run a pass is timed on tensors of its problem, torch's own included.

`tune` takes the passes that a model was heard to ask for (`example_run`), times them, largest first, within a bounded
time, and hands the times to `tuned`, which the dispatcher asks before its cost model. As torch's own kernel is among
those timed, and taken in a tie, a tuned pass is never slower than torch's but for noise.

A pass fused with a pool competes with the same pass put together from torch's convolution, activation and pooling.
Where that wins, the plain passes in it are tuned too.

A backend that can launch its kernels in several ways is timed in each of them (`candidates`), and those that do not run
here are left out with a warning.

While other processes keep cores busy that the threads of this one need, times are uncertain. They are used in this
process, where nothing better is known, but not kept for later ones, and a warning says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from . import dispatch, tuned
from .candidates import Step, competitors, prepare, steps_of
from .cost import busy
from .cost.timing import now
from .errors import BackendError
from .problem import ConvProblem, Pass

SECONDS = 60.0
"""Longest time that one call of `tune` spends, but for the pass in work at its end."""
SECONDS_PER_PASS = 1.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
MOST_QUEUED, QUEUED_SECONDS, LONGEST_QUEUED_SECONDS = 20, 2e-3, 0.2
"""Calls in a row on a GPU: at most so many, about so long for the fastest, and no longer for the slowest."""
HOPELESS_RATIO, HOPELESS_SECONDS = 10.0, 0.1
"""What takes so many times as long as the fastest and longer than that, in its first call too, is not run again."""


class Measure(Protocol):
    """Times callables against one another."""

    def __call__(self, steps: Mapping[str, Step], seconds: float) -> dict[str, float]:
        """Median seconds of each, spending about `seconds` in all."""


@dataclass(frozen=True)
class Tuned:
    """One pass of one problem with the times of all who can run it.

    Attributes:
        problem, pass_: what was timed.
        milliseconds: backend name, or "name@configuration" -> median time; "aten" is torch.
        expected: what the cost model takes without times.
        reused: whether the times were known before.
        kept: False where they were measured just now on a busy machine, and hold in this process only.

    Example:
        >>> one = Tuned(ConvProblem(1, 4, 4, (4, 4, 4), (3, 3, 3)), "forward", {"a": 1.0, "aten": 3.0}, "aten", False)
        >>> one.winner, one.speed_up, one.regret
        ('a', 3.0, 3.0)
    """

    problem: ConvProblem
    pass_: Pass
    milliseconds: Mapping[str, float]
    expected: str
    reused: bool
    kept: bool = True

    @property
    def winner(self) -> str:
        """Who runs the pass from now on (`tuned.winner_of`), with its configuration; "aten" with a pool: the pass is
        put together from plain ones."""
        return tuned.winner_of(self.milliseconds)

    @property
    def best(self) -> float:
        """Milliseconds of the winner."""
        return self.milliseconds[self.winner]

    @property
    def speed_up(self) -> float | None:
        """Torch's time over the winner's; None where torch cannot run the pass."""
        return self.milliseconds["aten"] / self.best if "aten" in self.milliseconds else None

    @property
    def regret(self) -> float | None:
        """The time of the cost model's choice over the winner's, 1 in a tie; None where that choice was not timed."""
        times = self.milliseconds
        return max(times[self.expected] / self.best, 1.0) if self.expected in times else None


def geometric_mean(ratios: Iterable[float | None]) -> float | None:
    """Of those that are known; None if none is.

    Example:
        >>> geometric_mean([2.0, None, 8.0])
        4.0
    """
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known else None


def tune(
    asked: Iterable[tuple[ConvProblem, Pass]],
    seconds: float = SECONDS,
    *,
    again: bool = False,
    even_if_busy: bool = False,
    measure: Measure | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Tuned]:
    """Time passes of problems, the largest first, and have the dispatcher take the fastest backend from now on.

    In a tie that is torch's own (`tuned.winner_of`).

    Times are kept for later processes, at Ctrl-C those that there are, unless other processes kept cores busy that this
    one needed (`cost.busy`; Linux only). A warning then says so, and the next process measures again.

    Args:
        asked: what to tune; passes whose times are known already are not timed again.
        seconds: bound on the whole, about one second per pass at most; what is left over then stays with the cost
            model, and a warning says how many passes that are.
        again: time known ones too.
        even_if_busy: keep the times of a busy machine, too.
        measure: what times the candidates; `measure_alternating` unless given.
        progress: called with a line before each pass is timed.

    Returns:
        What was timed, in the order of timing.
    """
    before = busy.sample()
    found: list[Tuned] = []
    try:
        left_out = _time_all(asked, time.monotonic() + seconds, again, measure, progress, found)
    finally:
        found = _remember(found, before, even_if_busy)
    if left_out:
        dispatch.logger.warning(
            "tuning ended after %.0f s; %d passes were not timed and stay with the cost model", seconds, left_out
        )
    return found


def _time_all(
    asked: Iterable[tuple[ConvProblem, Pass]],
    deadline: float,
    again: bool,
    measure: Measure | None,
    progress: Callable[[str], None],
    found: list[Tuned],
) -> int:
    """Append to `found` what is timed until the deadline; returns how many passes were left out."""
    queue = sorted(set(asked), key=lambda one: (-one[0].flops(one[1]), str(one[0]), one[1]))
    left_out = 0
    while queue:
        problem, pass_ = queue.pop(0)
        known = {} if again else tuned.milliseconds(problem, pass_)
        left = deadline - time.monotonic()
        if not known and left <= 0:
            left_out += 1
            continue
        progress(f"{len(found) + 1} of {len(found) + 1 + len(queue)}: {pass_} of {problem}")
        one = time_pass(problem, pass_, min(SECONDS_PER_PASS, left / (1 + len(queue))), known=known, measure=measure)
        if one is None:
            continue
        found.append(one)
        if problem.pool is not None and one.winner == "aten":
            plain = (problem.without_epilogue().with_(bias=problem.bias and pass_ == "forward"), pass_)
            queue += [plain] if plain not in queue and all(plain != (o.problem, o.pass_) for o in found) else []
    return left_out


def _remember(found: Sequence[Tuned], before: busy.Sample | None, even_if_busy: bool) -> list[Tuned]:
    """Have the dispatcher use the new times, and keep them for later processes if they are worth it."""
    new = {(one.problem, one.pass_): one.milliseconds for one in found if not one.reused}
    # Where a GPU computes, this process needs one core, to start it.
    threads = torch.get_num_threads() if any(problem.device == "cpu" for problem, _ in new) else 1
    load = busy.disturbance(before, busy.sample(), threads) if new else None
    keep = load is None or even_if_busy
    tuned.remember(new, keep=keep)
    dispatch.forget_choices()
    if load:
        dispatch.logger.warning(
            "other processes kept %.1f of %d cores busy while convolutions were timed: the times are uncertain%s",
            load.others,
            load.cores,
            "" if keep else ", and used in this process only; tune again on a quiet machine or with fewer threads",
        )
    return [one if one.reused else replace(one, kept=keep) for one in found]


def time_pass(
    problem: ConvProblem,
    pass_: Pass,
    seconds: float = SECONDS_PER_PASS,
    *,
    known: Mapping[str, float] | None = None,
    measure: Measure | None = None,
) -> Tuned | None:
    """The times of all backends that may be chosen for a pass, or `known` ones; None where there are none."""
    able = dispatch.able_backends(problem, pass_)
    expected = dispatch.expected_fastest(problem, pass_, able) if able else None
    name = expected.name if expected else "aten"
    if known:
        return Tuned(problem, pass_, dict(known), name, reused=True)
    competing = competitors(problem, pass_, able, expected)
    prepare(competing, problem, pass_)
    steps = steps_of(problem, pass_, competing)
    if not steps:
        return None
    with torch.no_grad():
        _leave_out_failing(steps, [one.label for one in competing if one.configuration])
        times = (measure or (measure_queued if problem.device == "cuda" else measure_alternating))(steps, seconds)
    return Tuned(problem, pass_, {backend: _rounded(1e3 * time) for backend, time in times.items()}, name, reused=False)


def _leave_out_failing(steps: dict[str, Step], configured: Sequence[str]) -> None:
    """Run configurations once and drop those that fail; a backend that fails in its own choice is an error."""
    for label in configured:
        if (error := _failure(steps[label])) is not None:
            del steps[label]
            dispatch.logger.warning("a configuration is left out of tuning: %s", str(error).splitlines()[0])


def _failure(step: Step) -> BackendError | None:
    try:
        step()
    except BackendError as error:
        return error
    return None


def measure_alternating(
    steps: Mapping[str, Step], seconds: float, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """Median seconds of each step, one call of each per round, every second round in reverse.

    The first call of each is not counted. A step that was twice as slow as the fastest in two rounds, or hopelessly
    slower in its first call and in one round, is left out of further ones.

    Args:
        steps: name -> callable.
        seconds: no further round starts after this time once there were five; there are at most 60.
        clock: returns seconds; by default a monotonic clock that waits for a CUDA device in use.
    """
    clock = clock or now
    first: dict[str, float] = {}
    for name, step in steps.items():
        start = clock()
        step()
        first[name] = clock() - start
    taken: dict[str, list[float]] = {name: [] for name in steps}
    running = list(steps)
    begin = clock()
    for done in range(1, MOST_ROUNDS + 1):
        for name in running:
            start = clock()
            steps[name]()
            taken[name].append(clock() - start)
        running.reverse()
        # Least times: an interruption may double one call, hardly two.
        best = min(map(min, taken.values()))
        if done > 1:
            running = [name for name in running if min(taken[name]) <= 2 * best]
        else:
            limit = max(HOPELESS_RATIO * best, HOPELESS_SECONDS)
            running = [name for name in running if min(first[name], *taken[name]) <= limit]
        if done >= FEWEST_ROUNDS and clock() - begin > seconds:
            break
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_queued(
    steps: Mapping[str, Step], seconds: float, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """As `measure_alternating`, for a device that works on while the host queues: several calls make one step.

    One call alone would be timed with what the host needs to start it and to see its end, the same for everybody.
    """
    clock = clock or now
    once = []
    for step in steps.values():
        step()
        start = clock()
        step()
        once.append(clock() - start)
    calls = max(1, int(min(MOST_QUEUED, QUEUED_SECONDS / min(once), LONGEST_QUEUED_SECONDS / max(once))))

    def several(step: Step) -> Step:
        def run() -> None:
            for _ in range(calls):
                step()

        return run

    times = measure_alternating({name: several(step) for name, step in steps.items()}, seconds, clock)
    return {name: time / calls for name, time in times.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
