"""The fused passes built with sanitizers: no access outside of their buffers."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from pyvolconv.problem import LAYOUTS

from ..harness import ISAS, SANITIZER_FLAGS, compile_harness
from .kernels import numbers
from .problems import CUT, parse


@pytest.mark.slow
@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("isa", "flags"),
    [
        ("baseline", []),
        ("avx2", ["-mavx2", "-mfma"]),
        ("avx512", ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]),
    ],
    ids=["sse2", "avx2", "avx512"],
)
def test_no_access_outside_of_buffers(isa, flags, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build with a sanitizer")
    if isa not in ISAS:
        pytest.skip(f"this machine lacks {isa}")
    program = tmp_path / "harness"
    compile_harness("cpp_fused_harness.cpp", program, *SANITIZER_FLAGS, *flags)
    problems = [parse(text, layout) for text in CUT for layout in LAYOUTS]
    text = "\n".join(" ".join(map(str, numbers(problem))) for problem in problems)
    ran = subprocess.run([str(program)], input=text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:4000]
    assert ran.stdout == f"{len(problems)} problems\n"
