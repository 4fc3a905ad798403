"""A clock that says what a test tells it to."""

from __future__ import annotations


def rigged(**seconds):
    """A stopwatch that runs every candidate once and then says what it was told to, one second if nothing."""

    def measure(steps, _):
        for step in steps.values():
            step()
        return {name: seconds.get(name.replace(".", "_"), 1.0) for name in steps}

    return measure
