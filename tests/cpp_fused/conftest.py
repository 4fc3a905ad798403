"""The kernels and problems that the tests of this folder run over."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Iterator

import pytest

from pyvolconv.problem import LAYOUTS, ConvProblem

from ..harness import EXTENSION, ISAS, KERNELS, MISSING, WIDE, WIDE_FLAGS, compile_harness
from .kernels import Fused, WideFused
from .problems import CUT, parse


@pytest.fixture(scope="session")
def wide_library(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile 64-byte vectors with")
    target = tmp_path_factory.mktemp("wide_fused") / "wide.so"
    compile_harness("cpp_fused_harness.cpp", target, *WIDE_FLAGS)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=KERNELS)
def fused(request) -> Iterator[Fused]:
    """The fused passes with the kernels of one instruction set."""
    if EXTENSION is None:
        pytest.skip(MISSING)
    if request.param == WIDE:
        if "avx2" not in ISAS:
            pytest.skip("64-byte vectors are tested with AVX2 instructions, which this machine lacks")
        yield WideFused(request.getfixturevalue("wide_library"))
        return
    before = EXTENSION.current_isa()
    EXTENSION.use_isa(request.param)
    yield Fused()
    EXTENSION.use_isa(before)


@pytest.fixture(
    params=[
        f"{layout}-{dtype}-{text}" for text, layout, dtype in itertools.product(CUT, LAYOUTS, ("float32", "float64"))
    ]
)
def cut_problem(request) -> ConvProblem:
    layout, dtype, text = request.param.split("-", 2)
    return parse(text, layout, dtype)
