"""What this process runs on and with, in words: the processor's name and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
import re
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
