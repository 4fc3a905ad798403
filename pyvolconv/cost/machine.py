"""What the machine is and what it can do: the two ceilings of the roofline, measured.

Roofline model: Williams, Waterman and Patterson, CACM 52(4), 2009. Work of F floating-point operations that moves
B bytes takes at least max(F / peak, B / bandwidth).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Machine:
    """One machine as this process sees it.

    Attributes:
        cpu: model name of the processor.
        architecture: e.g. "x86_64".
        isa: widest vector instruction set that the processor and the system offer, e.g. "AVX2+FMA".
        cores: physical cores this process may use.
        threads: `torch.get_num_threads()` at the time of measuring; both ceilings are for this number.
        caches: bytes of each cache of one core (the last level is shared), keys like "L1d", "L2", "L3".
        memory_bytes: main memory.
        peak_flops: float32 FLOP/s measured with `threads` threads, an FMA counted as two.
        peak_source: how `peak_flops` was measured, in words.
        copy_bandwidth: bytes/s of a large copy, read and written bytes both counted.
        openmp: the OpenMP runtime that is loaded.
        gpu: name of the CUDA device, None without one.
        versions: package name to version.

    Example:
        >>> machine = Machine("x", "x86_64", "AVX2", 1, 1, {}, 2**30, 1e11, "given", 1e10, "none", None, {})
        >>> machine.attainable_flops(flops=100, min_bytes=100)
        10000000000.0
    """

    cpu: str
    architecture: str
    isa: str
    cores: int
    threads: int
    caches: dict[str, int]
    memory_bytes: int
    peak_flops: float
    peak_source: str
    copy_bandwidth: float
    openmp: str
    gpu: str | None
    versions: dict[str, str]

    def least_seconds(self, flops: float, min_bytes: float) -> float:
        """The roofline's lower bound on the time of work of `flops` that moves `min_bytes`."""
        return max(flops / self.peak_flops, min_bytes / self.copy_bandwidth)

    def attainable_flops(self, flops: float, min_bytes: float) -> float:
        """The roofline's upper bound on FLOP/s of such work."""
        return flops / self.least_seconds(flops, min_bytes)

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain values for JSON."""
        return asdict(self)


@lru_cache(maxsize=8)
def _measured(threads: int) -> Machine:
    raise NotImplementedError


def measure_machine() -> Machine:
    """The machine, with both ceilings measured now; under two seconds, once per process and thread count."""
    return _measured(torch.get_num_threads())
