"""Problems of the tests of `cpp.amx`, and the units that compute them."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.cpp import CppDirect, kernels, load_extension
from pyvolconv.backends.cpp_amx import CppAmx
from pyvolconv.problem import PASSES

WITH = PASSES
"""The passes that the backend has."""

DIRECT = CppDirect()
TINY = torch.finfo(torch.float32).tiny

SMALL = (
    "n2ic5oc7-i3x4x5-k3x2x3-s2x1x2-p1x1x0-bias",  # an odd channel, residues of the stride
    "n1ic18oc33-i2x3x6-k3-p1-bias",  # one more than a tile of rows, and than a block of columns
    "n1ic3oc4-i3x2x17-k1x2x3-p0x1x2-d1x2x2",  # taps apart from one another
    "n2ic34oc17-i2x3x2-k1-bias",  # one row of height and width
    "n1ic1oc1-i4-k3-p2",
    "n3ic7oc5-i1-k3-p1-bias",  # one voxel
    "n1ic2oc3-i5x6x1-k3x3x1-p1x1x0",  # rows of one voxel
    "n1ic3oc4-i2x3x4-k2-p5+0x0+4x2+3-bias",  # padding wider than the kernel: windows of nothing else
    "n2ic3oc5-i5x4x6-k1-s2",  # most voxels meet no tap
    "n1ic2oc3-i5x6x7-k1x2x2-s3x3x4",  # strides larger than the kernel
)
"""For both units: the plain one is slow."""

LARGER = (
    "n2ic64oc64-i4x7x9-k3-p1-bias",
    "n1ic3oc50-i6x7x40-k3-p1-d2x1x2-bias",
    "n2ic33oc18-i9-k2-s2",  # a voxel that no window covers
    "n2ic20oc17-i5x6x40-k1x3x3-s1x3x3",
    "n1ic6oc9-i9x8x21-k2x3x3-p2x4x9-d5x4x9",  # dilation wider than a tile
    "n1ic3oc5-i9x9x13-k2x3x3-s4x2x3-p1x2x3-d2x4x3",  # residues without taps
    "n2ic8oc40-i13x14x15-k3-p1-bias",  # tiles along each axis, the last of them smaller
    "n1ic18oc5-i3x8x27-k3-s3x2x4-p0+1x0x0-d1x2x3",  # residues whose three taps are neighbours: transformed
    "n2ic6oc4-i9x10x9-k5x6x3-s2x2x1-p2x2x1",
    "n1ic7oc5-i11x14x9-k4x8x3-s2x3x1-p1x0x0",
    "n1ic3oc5-i7x9x6-k3-p1",  # an odd number of rows in tiles of two
    "n1ic4oc3-i1x2x700-k1x1x5-p0x0x2",
    "n1ic3100oc3-i4x5x6-k3-p1-bias",  # chunks of source channels, the last of them shorter
    "n1ic3oc3100-i4x5x6-k3-p1",
)

CELLS = [("own", text) for text in SMALL + LARGER] + [("plain", text) for text in SMALL]

NOT_SPLIT = {
    "infinity": 0x7F800000,
    "minus infinity": 0xFF800000,
    "NaN": 0x7FC00000,
    "NaN whose only bit bfloat16 does not have": 0x7F800001,
    "NaN of ones, which rounds to a zero": 0xFFFFFFFF,
    "rounds to infinity": 0x7F7F8000,
    "largest": 0x7F7FFFFF,
}
"""Bits of values that are no sum of bfloat16 ones."""


def unit_of(name: str) -> CppAmx:
    """The backend on the processor's own unit, or on the plain one; skips where it cannot run."""
    _, missing = load_extension()
    if missing:
        pytest.skip(missing)
    if kernels().current_isa() != "avx512":
        pytest.skip(f"parts are made with AVX-512; this processor has {kernels().current_isa()}")
    if name == "own" and not kernels().has_matrix_unit():
        pytest.skip("this processor has no AMX, or the system does not allow its use")
    backend = CppAmx()
    backend.plain = name == "plain"
    return backend


def integers(shape: tuple[int, ...], largest: int, layout: str) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape).float().contiguous(memory_format=MEMORY_FORMAT[layout])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))
