"""One line that says what a command is doing: it changes in place on a terminal, elsewhere each is a line of a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


def log(text: str) -> None:
    """One line on standard error, never folded."""
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


@contextmanager
def status(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show what is going on while the block runs; the value changes the words.

    Args:
        console: drawn on where it is a terminal; where it is none, the words go to standard error.
        text: the first words.
    """
    if console.is_terminal:
        with console.status(Text(text)) as shown:
            yield lambda line: shown.update(Text(line))
    else:
        log(text)
        yield log
