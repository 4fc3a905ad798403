"""Programs and libraries that tests build from csrc/ with the local compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvolconv.backends.cpp import load_extension

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
EXTENSION, MISSING = load_extension()
ISAS = EXTENSION.supported_isas() if EXTENSION else []
WIDE = "64-byte vectors"
"""The shape of AVX-512 made of AVX2 instructions."""
KERNELS = ISAS if "avx512" in ISAS else [*ISAS, WIDE]
WIDE_FLAGS = ("-O2", "-fPIC", "-shared", "-mavx2", "-mfma", "-DPVC_VECTOR_BYTES=64")
SANITIZER_FLAGS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DHARNESS_MAIN")


def compile_harness(source: str, target: Path, *flags: str) -> None:
    """Builds a harness of this folder with those kernels that it includes."""
    sources = [TESTS / source, CSRC / "arena.cpp", CSRC / "cache.cpp", CSRC / "parallel.cpp"]
    command = ["g++", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi", f"-I{CSRC}", *flags]
    built = subprocess.run([*command, *map(str, sources), "-o", str(target)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
