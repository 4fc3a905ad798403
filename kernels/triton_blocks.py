"""One way to launch an implicit-GEMM kernel, as a value with a short text form: what tuning tries and remembers."""

from __future__ import annotations

import re
from typing import NamedTuple

_PATTERN = re.compile(r"m(\d+)n(\d+)k(\d+)w(\d+)s(\d+)", re.ASCII)


class Blocks(NamedTuple):
    """Extents of the block of a product that one program computes, and what Triton makes of it.

    Attributes:
        m, n: rows and columns of the result that a program computes.
        k: summed indices of one step.
        warps: warps of a program, 32 threads each.
        stages: steps whose operands are in flight or in use at the same time.

    Example:
        >>> str(Blocks(128, 128, 64, 8, 3))
        'm128n128k64w8s3'
        >>> Blocks.parse("m128n128k64w8s3")
        Blocks(m=128, n=128, k=64, warps=8, stages=3)
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"m{self.m}n{self.n}k{self.k}w{self.warps}s{self.stages}"

    @property
    def options(self) -> dict[str, int]:
        """Those of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @classmethod
    def parse(cls, text: str) -> Blocks:
        """The blocks that `str(blocks)` wrote.

        Raises:
            ValueError: the text is not of that form, or Triton takes no such block: all but `stages` must be powers of
                two, and none may be zero.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} names no blocks; expected a form like 'm128n128k64w8s3'")
        blocks = cls(*map(int, match.groups()))
        if min(blocks) < 1 or any(size & (size - 1) for size in blocks[:4]):
            raise ValueError(f"{text!r}: m, n, k and w must be powers of two and s at least 1")
        return blocks
