"""The current CUDA device: what it is, what drives it, and the ceilings that it reaches, measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..host import version
from .timing import alternate

DRIVER = Path("/proc/driver/nvidia/version")
MATRIX_SIZE = 8192
LARGEST_COPY = 2**30
_SHARE_OF_FREE_MEMORY = 16
"""Operands of a measurement take at most so small a part of the memory that is free, each."""
_CALLS_AT_ONCE = 8
_HOPPER = 9


def gpu_facts() -> dict[str, str]:
    """Label to value of the current device: name, compute capability, multiprocessors, memory, TMA, versions."""
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    count = torch.cuda.device_count()
    number = f" (device {device} of {count}: CUDA_VISIBLE_DEVICES names another)" if count > 1 else ""
    capability = f"{properties.major}.{properties.minor}"
    has_tma = torch.version.hip is None and properties.major >= _HOPPER
    return {
        "GPU": f"{properties.name}{number}",
        "compute capability": f"{capability}, {properties.multi_processor_count} multiprocessors",
        "GPU memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "TMA": "yes" if has_tma else f"no: needs compute capability {_HOPPER}.0 or more, this is {capability}",
        "GPU software": f"driver {driver_version()}, CUDA {torch.version.cuda or 'none'}, cuDNN {cudnn_version()}, "
        f"triton {version('triton')}",
    }


def driver_version(file: Path = DRIVER) -> str:
    """Version of NVIDIA's driver, where the system says it, and else the newest CUDA that it runs."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)\s", file.read_text())
    except OSError:
        found = None
    if found is not None:
        return found[1]
    newest: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"for CUDA up to {newest // 1000}.{newest % 1000 // 10}"


def cudnn_version() -> str:
    """As cuDNN writes it, e.g. "9.19.0"; "none" without it."""
    found = torch.backends.cudnn.version()
    if found is None:
        return "none"
    # From cuDNN 9 on two digits more are the minor version's.
    major, rest = divmod(found, 10_000 if found >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def matrix_rates(device: str = "cuda") -> dict[str, float]:
    """FLOP/s of a large matrix product: of float32 operands in IEEE precision and in TF32, and of bfloat16 ones."""
    size = _affordable(device, MATRIX_SIZE**2 * 4, MATRIX_SIZE, root=2)
    products: dict[str, tuple[torch.dtype, str]] = {
        "float32": (torch.float32, "ieee"),
        "TF32": (torch.float32, "tf32"),
        "bfloat16": (torch.bfloat16, "ieee"),
    }
    generator = torch.Generator(device).manual_seed(0)
    rates = {}
    for name, (dtype, precision) in products.items():
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with _matmul_precision(precision):
            rates[name] = 2 * size**3 / _seconds(torch.mm, a, b, out=out)
    return rates


def copy_bandwidth(device: str = "cuda") -> float:
    """Bytes/s of a copy between two large buffers of the device, bytes read and bytes written both counted."""
    size = _affordable(device, LARGEST_COPY, LARGEST_COPY)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _seconds(target.copy_, source)


def _seconds(function: Callable[..., Any], *args: Any, **named: Any) -> float:
    """Least time of a call, several in a row: waiting for a device takes as long as a short call."""

    def several() -> None:
        for _ in range(_CALLS_AT_ONCE):
            function(*args, **named)

    return alternate({"calls": several}, rounds=5, warmup=1)["calls"].min / _CALLS_AT_ONCE


def _affordable(device: str, size_bytes: int, size: int, root: int = 1) -> int:
    """`size`, halved until `size_bytes`, which grow with its power `root`, are a small part of the free memory."""
    if device == "cpu":
        return size
    free, _ = torch.cuda.mem_get_info()
    while size_bytes > free / _SHARE_OF_FREE_MEMORY and size > 1:
        size, size_bytes = size // 2, size_bytes // 2**root
    return size


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
