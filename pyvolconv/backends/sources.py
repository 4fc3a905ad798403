"""Which kernels in Python these are: what times measured with them depend on."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

from .. import kernels
from ..host import version


@cache
def sources_digest() -> str:
    """Of the sources of kernels and backends, and of the version of Triton that compiles some of them at run time.

    Example:
        >>> len(sources_digest())
        16
    """
    digest = sha256(version("triton").encode())
    for folder in (Path(kernels.__path__[0]), Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
