"""Which Triton kernels these are: what times measured with them depend on."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

from .. import kernels
from ..host import version


@cache
def triton_digest() -> str:
    """Of the sources of kernels and backend, and of the version of Triton that compiles them at run time.

    Example:
        >>> len(triton_digest())
        16
    """
    files = [*Path(kernels.__path__[0]).glob("triton_*.py"), *Path(__file__).parent.glob("triton*.py")]
    digest = sha256(version("triton").encode())
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
