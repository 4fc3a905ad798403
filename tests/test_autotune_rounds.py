"""How candidates are timed: in turns, without the first call, by a clock that is made up here."""

from __future__ import annotations

import pytest

from pyvolconv import autotune
from pyvolconv.autotune import FEWEST_ROUNDS, measure_alternating, measure_queued


class Clock:
    """Time passes only by `run`, which also notes who ran."""

    def __init__(self):
        self.seconds, self.ran = 0.0, []

    def __call__(self):
        return self.seconds

    def run(self, name, *durations):
        def step():
            self.ran.append(name)
            self.seconds += durations[min(self.ran.count(name), len(durations)) - 1]

        return step


def test_candidates_alternate_and_the_first_call_does_not_count():
    clock = Clock()
    steps = {"a": clock.run("a", 9.0, 1.0), "b": clock.run("b", 9.0, 1.5)}
    assert measure_alternating(steps, 0.0, clock) == {"a": 1.0, "b": 1.5}
    assert "".join(clock.ran) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"


def test_calls_on_a_gpu_are_timed_several_in_a_row():
    clock, wait = Clock(), 1e-5
    steps = {"a": clock.run("a", 1e-4), "b": clock.run("b", 1.1e-4)}

    def synchronised():
        clock.seconds += wait
        return clock()

    times = measure_queued(steps, 0.0, synchronised)
    assert times == pytest.approx({"a": 1e-4, "b": 1.1e-4}, rel=0.01), "not the wait with every call"
    assert all(clock.ran.count(name) > 5 * FEWEST_ROUNDS for name in "ab")
    clock = Clock()
    assert measure_queued({"a": clock.run("a", 0.3), "b": clock.run("b", 1e-4)}, 0.0, clock)["a"] == pytest.approx(0.3)
    assert clock.ran.count("a") < 2 + 2 * FEWEST_ROUNDS


def test_one_interruption_changes_no_winner():
    clock = Clock()
    steps = {"a": clock.run("a", 1.0, 50.0, 1.0), "b": clock.run("b", 1.0, 1.5)}
    assert measure_alternating(steps, 0.0, clock) == {"a": 1.0, "b": 1.5}


def test_slow_candidates_are_left_out_of_later_rounds():
    clock = Clock()
    times = measure_alternating({"a": clock.run("a", 1.0), "b": clock.run("b", 9.0)}, 1000.0, clock)
    assert times == {"a": 1.0, "b": 9.0}
    assert clock.ran.count("b") == 3
    assert clock.ran.count("a") == 1 + autotune.MOST_ROUNDS


def test_hopeless_candidates_run_once_after_the_first_call():
    """Convolutions of patches have taken torch seconds on GPUs."""
    clock = Clock()
    steps = {"a": clock.run("a", 1.0), "b": clock.run("b", 20.0), "c": clock.run("c", 9.0)}
    measure_alternating(steps, 1000.0, clock)
    assert [clock.ran.count(name) for name in "bc"] == [2, 3]
    clock = Clock()
    measure_alternating({"a": clock.run("a", 1e-4), "b": clock.run("b", 0.09)}, 1000.0, clock)
    assert clock.ran.count("b") == 3, "short enough to have been interrupted"
