"""Builds pyvolconv._C from csrc/: one source compiled once per instruction set, linked into one module.

Needs setuptools, pybind11 and a C++17 compiler with OpenMP; torch is not needed. The objects are compiled with -fopenmp
and linked without it, so that the module carries no OpenMP runtime of its own: its symbols bind to the one that torch
has loaded, and both share one thread pool.

Environment variables:
    PYVOLCONV_NO_EXTENSION=1: install the Python part alone; the backend family "cpp" then says why it is unavailable.
    CXX: the C++ compiler.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

SOURCES = [
    "csrc/module.cpp",
    "csrc/bind_winograd.cpp",
    "csrc/bind_first_layer.cpp",
    "csrc/bind_split.cpp",
    "csrc/bind_instance_norm.cpp",
    "csrc/bind_reorder.cpp",
    "csrc/dispatch.cpp",
    "csrc/bandwidth.cpp",
    "csrc/parallel.cpp",
    "csrc/arena.cpp",
    "csrc/cache.cpp",
]
ISA_SOURCE = "csrc/isa_kernels.cpp"
X86_ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
ISA_FLAGS = X86_ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
OPENMP_FLAGS = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra"]
ISA_COMPILE_FLAGS = ["-Wno-psabi", "-Wno-unknown-pragmas"]

INSTALL_HINT = """
pyvolconv needs a C++17 compiler with OpenMP to build its compiled kernels, and {problem}.
  Debian, Ubuntu:   apt-get install g++
  Fedora, RHEL:     dnf install gcc-c++
  macOS:            xcode-select --install && brew install libomp, then put its include folder into CPPFLAGS
To choose a compiler set CXX. To install without the compiled kernels set PYVOLCONV_NO_EXTENSION=1.
"""


class BuildPerIsa(build_ext):  # type: ignore[misc]  # setuptools has no types
    """Compiles every source of the extension, and the ISA source once per instruction set, side by side."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        self._check_compiler()
        jobs: list[tuple[str, str, list[str]]] = [(source, "common", []) for source in ext.sources]
        jobs += [
            (ISA_SOURCE, isa, [*ISA_COMPILE_FLAGS, *flags, f"-DPVC_ISA={isa}"]) for isa, flags in ISA_FLAGS.items()
        ]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, folder, flags = job
            objects: list[str] = self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp, folder)),
                include_dirs=["csrc", *ext.include_dirs],
                extra_postargs=[*COMPILE_FLAGS, *OPENMP_FLAGS, *flags],
            )
            return objects

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), target_lang="c++")

    def _check_compiler(self) -> None:
        self._check("none was found that works", "int main() { return 0; }\n", [])
        without_openmp = "the one found does not support OpenMP"
        self._check(without_openmp, "#include <omp.h>\nint n = omp_get_max_threads();\n", OPENMP_FLAGS)

    def _check(self, problem: str, text: str, flags: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "check.cpp")
            source.write_text(text)
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-std=c++17", *flags])
            except CompileError as error:
                raise PlatformError(INSTALL_HINT.format(problem=problem)) from error


without_extension = os.environ.get("PYVOLCONV_NO_EXTENSION", "") not in ("", "0")
headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
extension = Pybind11Extension("pyvolconv._C", SOURCES, depends=[ISA_SOURCE, *headers], cxx_std=17)
setup(ext_modules=[] if without_extension else [extension], cmdclass={"build_ext": BuildPerIsa})
