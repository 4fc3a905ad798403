"""docs/drop_in.md: every test that it names exists, and every line of its tables names one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "drop_in.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[^`]*)`", PAGE)))


@cache
def names_in(file):
    """Names of the tests in a file."""
    nodes = ast.walk(ast.parse((REPOSITORY / file).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_named_test_exists():
    assert len(NAMED) > 50
    missing = []
    for name in NAMED:
        file, _, function = name.partition("::")
        if not (REPOSITORY / file).exists() or (function and function not in names_in(file)):
            missing.append(name)
    assert not missing


def test_every_line_of_a_table_names_a_test_or_a_file_of_tests():
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not re.match(r"\|[-|]+\|$", line)]
    rows = [row for row in rows if not row.startswith(("| behaviour |", "| client |"))]
    assert len(rows) > 40
    clients = PAGE[PAGE.index("## Real clients") : PAGE.index("## Direct callers")].splitlines()
    rows = [row for row in rows if row not in clients]  # one sentence below that table names the tests of all rows
    assert not [row for row in rows if not re.search(r"`tests/[^`]*\.py(::test_\w+)?`", row)]


def test_every_file_of_this_folder_is_named():
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert not [file for file in files if f"tests/contract/{file}" not in PAGE]
