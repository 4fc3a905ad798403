"""How the compiled part is built and loaded: instruction sets, symbols, the OpenMP runtime, and life without it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pyvolconv.backends import cpp
from pyvolconv.problem import PASSES, ConvProblem

ROOT = Path(__file__).parent.parent
EXTENSION, MISSING = cpp.load_extension()
PROBLEM = ConvProblem.parse("cpu-float32-ndhwc-n1ic2oc3-i4-k3")

compiled = pytest.mark.skipif(EXTENSION is None, reason=MISSING)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@compiled
def test_instruction_sets():
    supported = EXTENSION.supported_isas()
    assert supported[-1] == "baseline"
    assert set(supported) <= set(EXTENSION.compiled_isas())
    assert EXTENSION.current_isa() in supported
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx512" in supported) == (capability == "AVX512")
    with pytest.raises(ValueError, match="isa=mmx is not an instruction set of this build; expected one of: "):
        EXTENSION.use_isa("mmx")


CAPS = """
import os, sys
import torch, pyvolconv
from pyvolconv.backends.cpp import load_extension
from pyvolconv.info import backend_infos, installation

def convolve():
    return pyvolconv.conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3))

# The instruction set is chosen once per process: one child, which starts with nothing chosen, for each.
for cap in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork():
        assert os.wait()[1] == 0
        continue
    os.environ["PYVOLCONV_ISA"] = cap
    torch.set_num_threads(1)
    if cap != "mmx":
        print(load_extension()[0].current_isa(), convolve().unique().tolist())
        sys.stdout.flush()
        os._exit(0)
    for _ in range(2):
        try:
            convolve()
        except ValueError as error:
            print(error)
    print(installation()["instruction set"])
    print(installation()["cache"])
    print({info.reason for info in backend_infos() if info.name.startswith("cpp.")})
    sys.stdout.flush()
    os._exit(0)
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_isa_variable_caps_and_is_an_error_at_first_use_if_wrong():
    compiled_isas = EXTENSION.compiled_isas()
    supported = EXTENSION.supported_isas()
    run = python(CAPS, *compiled_isas, "mmx")
    assert run.returncode == 0, run.stderr
    *capped, first, second, isa, cache, backends = run.stdout.splitlines()
    best = [next(isa for isa in compiled_isas[cap:] if isa in supported) for cap in range(len(compiled_isas))]
    assert capped == [f"{isa} [54.0]" for isa in best]
    expected = "PYVOLCONV_ISA=mmx is not an instruction set of this build; expected one of: "
    expected += ", ".join(compiled_isas)
    assert first == second == expected
    assert (isa, cache) == (f"none usable: {expected}", f"not known: {expected}")
    assert backends == str({expected})


@compiled
def test_openmp_runtime_is_the_one_torch_ships():
    runtime = Path(EXTENSION.openmp_runtime()).resolve()
    assert Path(torch.__file__).resolve().parent in runtime.parents
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libgomp" in line}
    assert str(runtime) in {str(Path(path).resolve()) for path in mapped}


@compiled
def test_no_openmp_runtime_is_linked():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf to list the needed libraries with")
    listing = subprocess.run(["readelf", "-d", EXTENSION.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", listing)
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if "omp" in name or "torch" in name]


@compiled
def test_thread_count_follows_torch_in_every_python_thread(threads):
    def seen_after_a_pass() -> int:
        x, weight = torch.randn(PROBLEM.input_shape), torch.randn(PROBLEM.weight_shape)
        last = torch.channels_last_3d
        args = (x.contiguous(memory_format=last), weight.contiguous(memory_format=last))
        cpp.CppDirect().forward(PROBLEM, *args, None)
        return EXTENSION.openmp_threads()

    for count in (1, 2):
        threads(count)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(seen_after_a_pass).result() == count
        assert seen_after_a_pass() == count


@compiled
def test_measurements_are_plausible():
    peak = EXTENSION.measure_fma_peak(0.02)
    bandwidth = EXTENSION.measure_copy_bandwidth(0.02)
    assert 1e8 < peak < 1e14
    assert 1e7 < bandwidth < 1e13
    assert re.match(r"(g\+\+|clang) \d+", EXTENSION.compiler())


@pytest.fixture
def without_extension(monkeypatch):
    import pyvolconv

    monkeypatch.setitem(sys.modules, "pyvolconv._C", None)
    monkeypatch.delattr(pyvolconv, "_C", raising=False)
    cpp.load_extension.cache_clear()
    yield
    cpp.load_extension.cache_clear()


def test_without_the_extension_the_reason_is_one_line(without_extension):
    module, reason = cpp.load_extension()
    assert module is None
    for pass_ in PASSES:
        assert cpp.CppDirect().unsupported_reasons(PROBLEM, pass_) == [reason]
    assert "\n" not in reason
    assert "pyvolconv._C" in reason
    assert "g++" in reason


def test_reasons_name_what_is_given_and_expected():
    on_gpu = cpp.CppDirect().unsupported_reasons(PROBLEM.with_(device="cuda"), "forward")[0]
    in_half = cpp.CppDirect().unsupported_reasons(PROBLEM.with_(dtype="float16"), "forward")[0]
    assert on_gpu == "device is cuda; it runs on cpu"
    assert in_half == "dtype is float16; it computes float32 and float64"


def test_build_without_a_compiler_says_what_to_install(tmp_path):
    built = setup_py("build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}", CC="no-cc", CXX="no-c++")
    assert built.returncode != 0
    for hint in ("none was found that works", "apt-get install g++", "PYVOLCONV_NO_EXTENSION=1"):
        assert hint in built.stderr


def test_build_without_openmp_says_what_to_install(tmp_path):
    real = shutil.which("g++")
    if real is None:
        pytest.skip("no g++ to stand in for a compiler without OpenMP")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    folders = (f"--build-temp={tmp_path}", f"--build-lib={tmp_path}")
    built = setup_py("build_ext", *folders, CC=str(compiler), CXX=str(compiler))
    assert built.returncode != 0
    for hint in ("does not support OpenMP", "apt-get install g++", "libomp"):
        assert hint in built.stderr


def test_pure_python_build_has_no_extension(tmp_path):
    built = setup_py("build", f"--build-base={tmp_path}", PYVOLCONV_NO_EXTENSION="1")
    assert built.returncode == 0, built.stderr
    assert list(tmp_path.rglob("pyvolconv/backends/cpp.py"))
    assert list(tmp_path.rglob("pyvolconv/kernels/*.py"))
    assert not list(tmp_path.rglob("*.so"))


def test_sdist_holds_what_a_build_needs(tmp_path):
    built = setup_py("sdist", f"--dist-dir={tmp_path}")
    assert built.returncode == 0, built.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")}
    assert sources | kernels | {"setup.py", "pyproject.toml", "pyvolconv/_C.pyi"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


AVX = re.compile(r"\tv[a-z]")


def reachable_avx(library: Path) -> set[str]:
    """Functions made of AVX instructions under names that code outside of their object could resolve to."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    mangled, name = set(), ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line.partition("<")[2].removesuffix(">:")
        elif AVX.search(line):
            mangled.add(name)
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    # c++filt gives names of lambdas within lambdas back as they are.
    return {name for name in names.splitlines() if not re.search(r"\(anonymous namespace\)|_GLOBAL__N_", name)}


@compiled
def test_instruction_sets_leak_no_symbols():
    """A weak function built with AVX-512 flags could replace the same function elsewhere in the process."""
    if shutil.which("objdump") is None or "avx2" not in EXTENSION.compiled_isas():
        pytest.skip("no objdump to find AVX instructions with, or none of them in this build")
    assert reachable_avx(Path(EXTENSION.__file__)) == set()


def test_a_leaking_function_is_found(tmp_path):
    if shutil.which("objdump") is None or shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("no g++ and objdump for x86-64 to build and list a library with")
    source = tmp_path / "leak.cpp"
    source.write_text(
        "namespace { __attribute__((noinline)) double hidden(double* x) { return x[0] * 3 + x[1]; } }\n"
        "__attribute__((noinline)) inline double weak(double* x) { return x[0] * 2 + x[1]; }\n"
        "double table(double* x, int n) { return n ? weak(x) : hidden(x); }\n"
    )
    library = tmp_path / "leak.so"
    command = ["g++", "-O2", "-mavx2", "-shared", "-fPIC", "-fvisibility=hidden", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    assert "weak(double*)" in reachable_avx(library)
    assert not any("hidden" in name for name in reachable_avx(library))
