"""What this process runs on and with: the processor and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from functools import cache
from pathlib import Path


def processor() -> str:
    """Model name of the processor.

    Example:
        >>> processor() != ""
        True
    """
    return cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


@cache
def starts_two_wide_fmas() -> bool:
    """Whether the processor starts two FMAs of 64 bytes per cycle; False where the system does not say.

    Beside arithmetic, loads, stores and memory are then twice as dear as on other processors. No flag says so: it is
    Intel's with AVX-512, and AMD's from family 26 (Zen 5) on.

    Example:
        >>> starts_two_wide_fmas() in (True, False)
        True
    """
    if "avx512f" not in cpuinfo("flags").split():
        return False
    vendor, family = cpuinfo("vendor_id"), cpuinfo("cpu family")
    return vendor == "GenuineIntel" or (vendor == "AuthenticAMD" and family.isdigit() and int(family) >= 26)


def version(package: str) -> str:
    """The installed version of a package, or "not installed".

    Example:
        >>> version("no such package")
        'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
