"""The line that says what a command is doing."""

from __future__ import annotations

import io

from rich.console import Console

from pyvolconv.status import log, status

LONG = "forward of [cpu-float32-ncdhw] " + 40 * "word "


def test_where_there_is_no_terminal_every_line_is_on_standard_error(capsys):
    file = io.StringIO()
    with status(Console(file=file, width=40), "first") as say:
        say(LONG)
    log("last")
    captured = capsys.readouterr()
    assert [line.rstrip() for line in captured.err.splitlines()] == ["first", LONG.rstrip(), "last"]
    assert captured.out == file.getvalue() == ""


def test_on_a_terminal_it_changes_in_place(capsys):
    file = io.StringIO()
    with status(Console(file=file, force_terminal=True, width=80), "[first]") as say:
        say("[second]")
    assert "[second]" in file.getvalue()
    assert capsys.readouterr().err == ""
