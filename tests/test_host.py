"""What processors are told apart by, and what follows for the choice among backends."""

from __future__ import annotations

import pytest

from pyvolconv import host
from pyvolconv.backends import aten_efficiency, cpp
from pyvolconv.backends.cpp_amx import CppAmx
from pyvolconv.dispatch import choose, forget_choices
from pyvolconv.problem import ConvProblem

PROCESSORS = [
    ({"flags": "sse2 avx512f avx512vl", "vendor_id": "GenuineIntel", "cpu family": "6"}, True),
    ({"flags": "sse2 avx2 fma", "vendor_id": "GenuineIntel", "cpu family": "6"}, False),
    ({"flags": "avx512f", "vendor_id": "AuthenticAMD", "cpu family": "25"}, False),
    ({"flags": "avx512f", "vendor_id": "AuthenticAMD", "cpu family": "26"}, True),
    ({"flags": "avx512f", "vendor_id": "SomebodyElse", "cpu family": "26"}, False),
    ({}, False),
]


@pytest.fixture
def cheap(monkeypatch):
    """cheap(bool): whether arithmetic is, for the cost models."""

    def pretend(answer):
        monkeypatch.setattr(cpp, "starts_two_wide_fmas", lambda: answer)
        monkeypatch.setattr(aten_efficiency, "starts_two_wide_fmas", lambda: answer)
        monkeypatch.setattr(CppAmx, "unsupported_reasons", lambda *_: ["this processor has no AMX"])
        forget_choices()

    yield pretend
    monkeypatch.undo()
    forget_choices()


@pytest.mark.parametrize(("fields", "expected"), PROCESSORS)
def test_two_wide_fmas(fields, expected, monkeypatch):
    monkeypatch.setattr(host, "cpuinfo", lambda field: fields.get(field, ""))
    host.starts_two_wide_fmas.cache_clear()
    try:
        assert host.starts_two_wide_fmas() is expected
    finally:
        host.starts_two_wide_fmas.cache_clear()


@pytest.mark.parametrize(
    ("text", "dear", "cheap_choice"),
    [
        ("ndhwc-n2ic64oc64-i16x28x28-k3x1x1-p1x0x0", "cpp.winograd", "aten"),  # too few taps to pay for moving the data
        ("ndhwc-n8ic160oc320-i8x7x7-k3-p1", "cpp.winograd", "aten"),  # few voxels under many weights
        ("ncdhw-n1ic512oc512-i4x5x5-k1x3x3-p0x1x1", "cpp.winograd", "aten"),  # fewer voxels than weights to transform
        ("ndhwc-n2ic64oc64-i32-k3-p1", "cpp.winograd", "cpp.winograd"),
        ("ncdhw-n32ic16oc24-i15x15x30-k3-p1", "cpp.winograd", "cpp.winograd"),
    ],
)
def test_what_is_moved_weighs_more_where_arithmetic_is_cheap(text, dear, cheap_choice, cheap):
    extension, _ = cpp.load_extension()
    if extension is None or extension.current_isa() != "avx512":
        pytest.skip("the kernels in use have no 64-byte vectors")
    problem = ConvProblem.parse(f"cpu-float32-{text}")
    for answer, expected in ((False, dear), (True, cheap_choice)):
        cheap(answer)
        assert choose(problem, "forward").name == expected


def test_a_call_of_torch_costs_more_than_a_tiny_problem(cheap):
    if cpp.load_extension()[0] is None:
        pytest.skip("no compiled kernels")
    problem = ConvProblem.parse("cpu-float32-ncdhw-n2ic16oc16-i4x5x6-k3-p1")
    for answer in (False, True):
        cheap(answer)
        assert choose(problem, "grad_input").family == "cpp"
