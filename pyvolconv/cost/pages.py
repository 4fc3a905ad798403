"""Keeping freed memory in the process, and counting the page faults that doing otherwise costs.

glibc maps every allocation above M_MMAP_THRESHOLD (it adapts up to 32 MiB) on its own and unmaps it when freed, and
trims the top of the heap. Each training step then gets its large activations as fresh pages, which the kernel zeroes
one fault at a time: on the networks measured here that costs more than their arithmetic.

`keep_pages()` turns both off with mallopt(3): M_MMAP_MAX = 0 (a threshold above 32 MiB is refused, so "never map" has
to be said this way) and M_TRIM_THRESHOLD = -1. The price is that the process keeps its peak memory.

Undoing has a limit of glibc's: after any mallopt call its thresholds no longer adapt. `undo()` therefore sets
the values at which adaptation ends (map from 32 MiB, trim from twice that), and gives kept memory back. To measure
"pages returned" as a process has it that never called mallopt, measure it before the first `keep_pages()`.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

if sys.platform != "win32":
    import resource

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_MAX_ADAPTED_MMAP_THRESHOLD = 32 * 1024 * 1024
_DEFAULT_MMAP_MAX = 65536

_SAMPLE_SECONDS = 0.0005

_lock = threading.Lock()
_holders = 0


@dataclass(frozen=True)
class StepMemory:
    """What one call took from the system.

    Attributes:
        page_faults: minor page faults of the process during the call.
        peak_rss_bytes: largest resident set during the call.
        added_rss_bytes: `peak_rss_bytes` minus the resident set before.
        source: how the peak was measured, in words.
    """

    page_faults: int
    peak_rss_bytes: int
    added_rss_bytes: int
    source: str

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain values for JSON."""
        return asdict(self)


class KeepPages:
    """What `keep_pages()` returns: says whether it worked, undoes it, and can be used in a `with` block.

    Attributes:
        active: whether freed memory is being kept on account of this call.
        reason: why not, in one line; "" when it worked.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.active = not reason

    def undo(self) -> None:
        """Ends this call's effect; the last one returns kept memory to the system. A second call does nothing."""
        global _holders
        with _lock:
            if not self.active:
                return
            self.active = False
            _holders -= 1
            if _holders == 0:
                libc = ctypes.CDLL(None)
                libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
                libc.mallopt(_M_MMAP_THRESHOLD, _MAX_ADAPTED_MMAP_THRESHOLD)
                libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MAX_ADAPTED_MMAP_THRESHOLD)
                libc.malloc_trim(ctypes.c_size_t(0))

    def __enter__(self) -> KeepPages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return "KeepPages(active)" if self.active else f"KeepPages(not active: {self.reason or 'undone'})"


def keep_pages() -> KeepPages:
    """Makes glibc keep freed memory in the process, so that a training step stops faulting in fresh pages.

    It acts on the whole process, until every returned object has been undone. Where it cannot work (another C library,
    another allocator) nothing is changed and `.reason` says why.

    Example:
        >>> import pyvolconv
        >>> with pyvolconv.keep_pages() as kept:  # or without a block, for the rest of the process
        ...     kept.active or kept.reason != ""
        True
    """
    global _holders
    reason = _unsupported_reason()
    if reason:
        return KeepPages(reason)
    with _lock:
        if _holders == 0:
            libc = ctypes.CDLL(None)
            if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
                return KeepPages("mallopt(3) refused M_MMAP_MAX=0 or M_TRIM_THRESHOLD=-1")
        _holders += 1
        return KeepPages("")


def pages_kept() -> bool:
    """Whether a `keep_pages()` is in force in this process."""
    return _holders > 0


def page_faults() -> int:
    """Minor page faults of this process so far, all threads; 0 on Windows, which does not count them this way."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if sys.platform != "win32" else 0


def return_pages() -> bool:
    """Give the memory that glibc holds free back to the system now; whether that could be done.

    Example:
        >>> return_pages() in (True, False)
        True
    """
    if _unsupported_reason():
        return False
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    return True


def measure_memory(step: Callable[[], object]) -> StepMemory:
    """Page faults and peak resident set of one call of `step`.

    Linux resets its own high-water mark for the call where the kernel allows it; else the resident set is sampled
    every half millisecond by a thread, and `source` says so.

    Raises:
        OSError: the system has no /proc, from which both are read.

    Example:
        >>> measure_memory(lambda: bytearray(1 << 24)).added_rss_bytes >= 0
        True
    """
    before = _resident_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _measure_by_sampling(step, before)
    faults = page_faults()
    step()
    faults = page_faults() - faults
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        return _measure_by_sampling(step, before)
    peak = int(match[1]) * 1024
    return StepMemory(faults, peak, peak - before, "high-water mark of the kernel (VmHWM)")


def _measure_by_sampling(step: Callable[[], object], before: int) -> StepMemory:
    peak = before
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(_SAMPLE_SECONDS):
            peak = max(peak, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    faults = page_faults()
    try:
        step()
    finally:
        faults = page_faults() - faults
        stop.set()
        sampler.join()
    peak = max(peak, _resident_bytes())
    return StepMemory(faults, peak, peak - before, f"resident set sampled every {_SAMPLE_SECONDS * 1e3:g} ms")


def _resident_bytes() -> int:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _unsupported_reason() -> str:
    """Why mallopt(3) would have no effect in this process; "" when it has."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):
        version = None
    if not version:
        return f"the C library is not glibc (platform {sys.platform}); only glibc's allocator can be told to keep pages"
    libc = ctypes.CDLL(None)
    info = _DlInfo()
    if libc.dladdr(ctypes.cast(libc.malloc, ctypes.c_void_p), ctypes.byref(info)) and info.dli_fname:
        owner = Path(info.dli_fname.decode()).name
        if not owner.startswith("libc"):
            return f"malloc is not glibc's here but {owner}'s; configure that allocator to keep pages"
    return ""
