"""What the machine is and what it can do: the two ceilings of the roofline, measured.

Roofline model: Williams, Waterman and Patterson, CACM 52(4), 2009. Work of F floating-point operations that moves
B bytes takes at least max(F / peak, B / bandwidth).
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from ..host import cpuinfo, processor, version
from .gpu import copy_bandwidth, gpu_facts, matrix_rates
from .timing import alternate

_PACKAGES = ("pyvolconv", "torch", "numpy", "numba", "triton")
_CPU = Path("/sys/devices/system/cpu")
_PEAK_WINDOW_SECONDS = 0.02
_PEAK_WINDOWS = 10
_MATMUL_SIZE = 1024
_SMALLEST_COPY = 64 * 2**20
_LARGEST_COPY = 512 * 2**20


@dataclass(frozen=True)
class Machine:
    """One machine as this process sees it.

    Attributes:
        cpu: model name of the processor.
        architecture: e.g. "x86_64".
        isa: vector instruction sets that processor and system offer, widest first, e.g. "AVX2+FMA".
        cores: physical cores this process may use.
        threads: `torch.get_num_threads()` at the time of measuring; the ceilings are for this number.
        caches: bytes of each cache that one core sees (the last level is shared), keys like "L1d", "L2", "L3".
        memory_bytes: main memory, 0 if unknown.
        device: "cpu" or "cuda": whose ceilings these are.
        peak_flops: FLOP/s on float32 operands, an FMA counted as two; on CUDA those of a matrix product in TF32, which
            torch's convolutions may use unless told otherwise.
        peak_source: how `peak_flops` was measured, in words.
        copy_bandwidth: bytes/s of a copy that no cache holds, bytes read and bytes written both counted.
        openmp: the OpenMP runtimes that are loaded.
        gpu: name of the CUDA device, None without one.
        versions: package name to version.
        matrix_rates: on CUDA, FLOP/s of a large matrix product by precision: "float32", "TF32", "bfloat16".
        gpu_facts: on CUDA, what describes the device: label to value.

    Example:
        >>> machine = Machine("x", "x86_64", "AVX2", 1, 1, {}, 2**30, "cpu", 1e11, "given", 1e10, "none", None, {})
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
    device: str
    peak_flops: float
    peak_source: str
    copy_bandwidth: float
    openmp: str
    gpu: str | None
    versions: dict[str, str]
    matrix_rates: dict[str, float] = field(default_factory=dict)
    gpu_facts: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of what computes: the GPU's where these ceilings are a GPU's, else the processor's."""
        return self.gpu if self.device == "cuda" and self.gpu else self.cpu

    @property
    def peak_name(self) -> str:
        """What `peak_flops` is called."""
        return "TF32 matrix peak" if self.device == "cuda" else "FMA peak"

    def without_tf32(self) -> Machine:
        """The same machine for work whose float32 operands are not rounded."""
        rate = self.matrix_rates.get("float32")
        if rate is None:
            return self
        return replace(self, peak_flops=rate, peak_source="a large matrix product of float32 in IEEE precision")

    def least_seconds(self, flops: float, min_bytes: float) -> float:
        """The roofline's lower bound on the time of work of `flops` that moves `min_bytes`."""
        return max(flops / self.peak_flops, min_bytes / self.copy_bandwidth)

    def attainable_flops(self, flops: float, min_bytes: float) -> float:
        """The roofline's upper bound on FLOP/s of such work; `peak_flops` where no byte need move."""
        least = self.least_seconds(flops, min_bytes)
        return flops / least if least > 0 else self.peak_flops

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain values for JSON."""
        return asdict(self)


def measure_machine(device: Literal["cpu", "cuda"] = "cpu") -> Machine:
    """The machine, with both ceilings measured now: under two seconds, then remembered per thread count and GPU.

    Example:
        >>> measure_machine().peak_flops > 0
        True
    """
    gpu = torch.cuda.current_device() if device == "cuda" else None
    return _measure(device, torch.get_num_threads(), gpu)


@lru_cache(maxsize=16)
def _measure(device: str, threads: int, gpu: int | None) -> Machine:
    caches = _caches()
    rates: dict[str, float] = {}
    if gpu is None:
        peak, source = _peak(threads)
        bandwidth = _copy_bandwidth(max(caches.values(), default=0))
    else:
        rates, bandwidth = matrix_rates(), copy_bandwidth()
        peak, source = rates["TF32"], "a large matrix product of float32 in TF32"
        # Gigabytes that nobody needs any more.
        torch.cuda.empty_cache()
    return Machine(
        cpu=processor(),
        architecture=platform.machine(),
        isa=_isa(),
        cores=_cores(),
        threads=threads,
        caches=caches,
        memory_bytes=_memory_bytes(),
        device=device,
        peak_flops=peak,
        peak_source=source,
        copy_bandwidth=bandwidth,
        openmp=openmp_runtimes(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions=versions(),
        matrix_rates=rates,
        gpu_facts={} if gpu is None else gpu_facts(),
    )


def openmp_runtimes() -> str:
    """File names of the OpenMP runtimes in this process, each marked where it is the one that torch ships."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown (no /proc)"
    torch_folder = str(Path(torch.__file__).parent)
    names = {
        Path(path).name + (" (torch's)" if path.startswith(torch_folder) else "")
        for path in re.findall(r"\s(/\S*/lib(?:gomp|iomp5|omp)[-.]\S*)", maps)
    }
    return ", ".join(sorted(names)) or "none"


def _peak(threads: int) -> tuple[float, str]:
    try:
        compiled = importlib.import_module("pyvolconv._C")
    except ImportError:
        return _matmul_rate(), "torch.mm float32 (pyvolconv is not compiled here: a lower bound of FMA peak)"
    # A ceiling: the best of several short windows is what the machine does when nothing else runs on it.
    flops = max(compiled.measure_fma_peak(_PEAK_WINDOW_SECONDS) for _ in range(_PEAK_WINDOWS))
    return flops, f"independent float32 FMAs in registers, {threads} threads"


def _matmul_rate() -> float:
    size = _MATMUL_SIZE
    a, b, out = (torch.ones(size, size) for _ in range(3))
    seconds = alternate({"mm": lambda: torch.mm(a, b, out=out)}, rounds=8, warmup=2)["mm"].min
    return 2 * size**3 / seconds


def _copy_bandwidth(largest_cache: int) -> float:
    # Source and target together four times the last level: what the previous copy left in cache is a small part.
    size = min(max(_SMALLEST_COPY, 2 * largest_cache), _LARGEST_COPY)
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    seconds = alternate({"copy": lambda: target.copy_(source)}, rounds=8, warmup=1)["copy"].min
    return 2 * size / seconds


def versions() -> dict[str, str]:
    """Python and packages: name to version."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def _isa() -> str:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "SVE+NEON" if "sve" in cpuinfo("Features").split() else "NEON"
    flags = set(cpuinfo("flags").split())
    names = [
        name
        for flag, name in (("amx_tile", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("avx512f", "AVX512"))
        if flag in flags
    ]
    if "avx2" in flags:
        names.append("AVX2+FMA" if "fma" in flags else "AVX2")
    return ", ".join(names) or f"torch: {torch.backends.cpu.get_cpu_capability()}"


def _cores() -> int:
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        topology = _CPU / f"cpu{cpu}" / "topology"
        try:
            cores.add(tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id")))
        except OSError:
            cores.add((str(cpu),))
    return len(cores)


def _caches() -> dict[str, int]:
    caches = {}
    for index in sorted((_CPU / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        caches[f"L{level}{suffix}"] = int(size.removesuffix("K")) * 1024
    return caches


def _memory_bytes() -> int:
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
