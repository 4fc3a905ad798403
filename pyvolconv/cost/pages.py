"""Keeping freed memory in the process, and counting the page faults that doing otherwise costs.

glibc maps every allocation above M_MMAP_THRESHOLD (at most 32 MiB) on its own and unmaps it when freed, and trims the
top of the heap. Each training step then gets its activations as fresh pages, which the kernel zeroes one fault at a
time: on the networks measured here that costs more than their arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType


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
        reason: why not, in one line; "" when active.
    """

    active: bool
    reason: str

    def undo(self) -> None:
        """Back to glibc's defaults; memory kept so far goes back to the system."""
        raise NotImplementedError

    def __enter__(self) -> KeepPages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def keep_pages() -> KeepPages:
    """Makes glibc keep freed memory in the process instead of returning it to the system."""
    raise NotImplementedError


def pages_kept() -> bool:
    """Whether `keep_pages()` is in force."""
    raise NotImplementedError


def page_faults() -> int:
    """Minor page faults of this process so far, all threads."""
    raise NotImplementedError


def measure_memory(step: Callable[[], object]) -> StepMemory:
    """Page faults and peak resident set of one call of `step`."""
    raise NotImplementedError
