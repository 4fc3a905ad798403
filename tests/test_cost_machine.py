"""The machine as measured, timing helpers, and pages kept or returned."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pyvolconv.cost import (
    Machine,
    Timing,
    alternate,
    keep_pages,
    measure_machine,
    measure_memory,
    pages_kept,
    time_step,
)
from pyvolconv.cost.pages import _unsupported_reason

MIB = 2**20
glibc_only = pytest.mark.skipif(bool(_unsupported_reason()), reason=_unsupported_reason() or "glibc")


@pytest.fixture
def machine() -> Machine:
    return Machine("x", "x86_64", "AVX2", 2, 2, {"L1d": 32768}, 2**34, "cpu", 2e11, "given", 2e10, "none", None, {})


def test_roofline(machine):
    assert machine.least_seconds(2e11, 0) == 1
    assert machine.least_seconds(0, 2e10) == 1
    assert machine.attainable_flops(10, 1) == 2e11, "ten operations per byte: bound by arithmetic"
    assert machine.attainable_flops(1, 1) == 2e10, "one operation per byte: bound by bandwidth"
    assert machine.attainable_flops(0, 0) == 2e11


def test_measured_machine_is_plausible_remembered_and_json():
    machine = measure_machine()
    assert measure_machine() is machine
    assert machine.peak_flops > 1e8
    assert machine.copy_bandwidth > 1e7
    assert machine.threads == torch.get_num_threads()
    assert machine.cores >= 1
    assert machine.versions["torch"] != "not installed"
    assert json.loads(json.dumps(machine.to_dict()))["cpu"] == machine.cpu


def test_peak_says_how_it_was_measured_without_the_compiled_part(monkeypatch):
    from pyvolconv.cost import machine as module

    monkeypatch.setitem(sys.modules, "pyvolconv._C", None)
    peak, source = module._peak(1)
    assert peak > 0
    assert "torch.mm" in source


def test_alternate_interleaves_and_reverses():
    order: list[str] = []
    timings = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_timing():
    assert len(time_step(lambda: None, warmup=0, repeats=4).seconds) == 4
    assert Timing((3.0, 1.0, 2.0)).to_dict() == {"seconds": (3.0, 1.0, 2.0), "median": 2.0, "min": 1.0}
    with pytest.raises(ValueError, match="rounds=0"):
        time_step(lambda: None, repeats=0)


def test_memory_of_a_step_sees_what_it_touches():
    memory = measure_memory(lambda: torch.ones(64 * MIB // 4).sum())
    assert memory.peak_rss_bytes >= 64 * MIB
    assert memory.added_rss_bytes >= 0
    assert json.dumps(memory.to_dict())


def test_memory_by_sampling_where_the_kernel_does_not_reset_its_mark(monkeypatch):
    from pyvolconv.cost import pages

    def refused(self: object, text: str) -> int:
        raise PermissionError

    monkeypatch.setattr(pages.Path, "write_text", refused)
    memory = measure_memory(lambda: [torch.ones(16 * MIB // 4) for _ in range(8)])
    assert "sampled" in memory.source
    assert memory.added_rss_bytes > 0


@glibc_only
def test_pages_are_kept_then_returned():
    """In a process of its own, since allocator settings belong to the whole process."""
    program = (
        "import torch, sys; torch.set_num_threads(1)\n"
        "from pyvolconv.cost.pages import keep_pages, page_faults, pages_kept\n"
        "def faults(size=12 << 20):\n"
        "    for _ in range(3): torch.ones(size)  # the heap grows to what the loop needs\n"
        "    before = page_faults()\n"
        # Forty blocks, because one or two may still make the heap grow.
        "    [torch.ones(size).sum() and None for _ in range(40)]\n"
        "    return page_faults() - before\n"
        "returned = faults()\n"
        "with keep_pages() as kept: inside = faults(); assert pages_kept() and kept.active\n"
        "assert not pages_kept() and not kept.active\n"
        # Larger ones: what the heap holds below something that is in use it cannot return.
        "after = faults(20 << 20)\n"
        "print(returned, inside, after)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    returned, inside, after = map(int, run.stdout.split())
    assert inside < returned / 10
    assert after > inside


@glibc_only
def test_keeping_pages_nests():
    outer = keep_pages()
    with keep_pages():
        assert pages_kept()
    assert pages_kept()
    outer.undo()
    outer.undo()
    assert not pages_kept()
    assert repr(outer) == "KeepPages(not active: undone)"


def test_keep_pages_says_why_not(monkeypatch):
    from pyvolconv.cost import pages

    monkeypatch.setattr(pages.os, "confstr", lambda name: None)
    kept = keep_pages()
    assert not kept.active
    assert "not glibc" in kept.reason
    assert not pages_kept()
    kept.undo()
