"""pyvolconv.kernels: found under its own name only, and nothing is loaded or registered by importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pyvolconv.kernels

FOLDER = Path(pyvolconv.kernels.__file__).parent


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_top_level_import_is_refused_with_the_right_name():
    """`kernels` is Hugging Face's package; ours lies in a folder of that name at the repository's root."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels"
    result = run_python(code, str(FOLDER.parent))
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "import pyvolconv.kernels instead" in result.stderr


def test_importing_the_package_and_the_backends_compiles_nothing():
    """Neither Numba nor any kernel; Triton itself is imported by torch.utils.flop_counter."""
    code = """
import sys
import pyvolconv, pyvolconv.kernels, pyvolconv.backends.numba, pyvolconv.backends.im2col, pyvolconv.backends.triton_tma
print([name for name in sys.modules if name == "numba" or name.startswith("pyvolconv.kernels.")])
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_use_relative_imports_and_register_nothing(path):
    source = path.read_text()
    assert "pyvolconv.ops" not in source
    assert "torch.library" not in source
    for line in source.splitlines():
        assert not line.startswith(("import pyvolconv", "from pyvolconv", "import kernels", "from kernels")), line
        assert not line.startswith("from .."), f"a kernel reaches above its floor: {line}"
