"""Triton kernels compiled for a Hopper GPU on a machine without one, in a process that does not interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILED = """
import sys, torch
from benchmarks.gpu_code import compiled, order_of_loop
"""


def compile_on(code: str, cases: Iterable[str], cache: Path) -> list[list[str]]:
    """The words of each line that `code` prints, after COMPILED, with cases in sys.argv."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", COMPILED + code, *cases],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]
