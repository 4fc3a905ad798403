"""Tensors of more than 2**31 elements: the results of the places where anything is, and zeros everywhere else.

Pages of an input that nobody writes are one page of zeros of the kernel's, so that only results take memory.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .layers import FORMATS

pytestmark = pytest.mark.slow

SAMPLES = {"one sample": (1, 8, 65, 2048, 2048), "many samples": (17, 8, 4, 2048, 2048)}
# Where something is, in each sample that is named: the ends, and what lies around them.
HEIGHT, WIDTH = 12, 44


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def need(gibibytes: float) -> None:
    free = available_bytes() / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free memory, {free:.1f} are there")


def zeros(shape, memory_format):
    """Zeros in pages that are not there yet; torch.zeros would write them."""
    flat = torch.from_numpy(np.zeros(int(np.prod(shape)), np.float32))
    if memory_format is torch.contiguous_format:
        return flat.view(shape)
    batch, channels, *size = shape
    return flat.view(batch, *size, channels).movedim(-1, 1)


def corners(tensor, height, width):
    """Views of the first and the last plane of the first and last sample, and of one in the middle."""
    batch, _, depth, *_ = tensor.shape
    for sample, plane in {(0, 0), (batch // 2, depth // 2), (batch - 1, depth - 1)}:
        yield tensor[sample : sample + 1, :, plane : plane + 1, :height, :width]
        yield tensor[sample : sample + 1, :, plane : plane + 1, -height:, -width:]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SAMPLES.values(), ids=SAMPLES)
def test_input(shape, memory_format):
    """Forward and the gradient of the weight, which read an input of that size."""
    need(4)
    theirs = nn.Conv3d(8, 2, (1, 2, 2), stride=(1, 2, 2), bias=False).to(memory_format=memory_format)
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = zeros(shape, memory_format)
    assert x.numel() > 2**31
    for corner in corners(x, HEIGHT, WIDTH):
        corner.copy_(torch.randn(corner.shape))
    with pyvolconv.use_backend("cpp"):
        y = ours(x)
    expected = [theirs(corner) for corner in corners(x, HEIGHT, WIDTH)]
    nonzero = 0
    for got, wanted in zip(corners(y, HEIGHT // 2, WIDTH // 2), expected, strict=True):
        assert_close(got.detach(), wanted.detach())
        nonzero += int(wanted.count_nonzero())
    assert int(y.detach().count_nonzero()) == nonzero

    cotangent = torch.zeros_like(y)
    for corner, wanted in zip(corners(cotangent, HEIGHT // 2, WIDTH // 2), expected, strict=True):
        corner.copy_(torch.randn(wanted.shape))
        wanted.backward(corner)
    y.backward(cotangent)
    assert_close(ours.weight.grad, theirs.weight.grad)


def test_output():
    """Forward, and the gradient of the input as the transposed convolution that it is, which write that much.

    One after the other in one test, so that no two processes hold such a result.
    """
    need(12)
    check_output(nn.Conv3d(1, 8, 1), 1)
    transposed = nn.ConvTranspose3d(1, 8, (1, 2, 2), stride=(1, 2, 2))
    check_output(transposed.to(memory_format=torch.channels_last_3d), 2)


def check_output(theirs, step):
    """A layer whose windows of 1 x step x step voxels touch."""
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = zeros((1, 1, 65, 2048 // step, 2048 // step), torch.contiguous_format)
    for corner in corners(x, HEIGHT, WIDTH):
        corner.copy_(torch.randn(corner.shape))
    with torch.no_grad(), pyvolconv.use_backend("cpp"):
        y = ours(x)
        assert y.numel() > 2**31
        for got, corner in zip(corners(y, HEIGHT * step, WIDTH * step), corners(x, HEIGHT, WIDTH), strict=True):
            assert_close(got, theirs(corner))
        # Everywhere else the bias alone.
        assert_close(y[0, :, 1, 100, ::128], theirs.bias.view(-1, 1).expand(8, 16))


@pytest.mark.parametrize(("name", "dtype"), [("im2col", np.float32), ("cpp.widened", np.float16)])
def test_other_backends(name, dtype):
    """Kernels that the cost model does not take for float32 on a CPU."""
    need(6)
    x = torch.from_numpy(np.zeros(2**31 + 2**26, dtype)).view(1, 4, 33, 4096, 4096)
    w = torch.randn(1, 4, 1, 1, 1).to(x.dtype)
    for corner in corners(x, HEIGHT, WIDTH):
        corner.copy_(torch.randn(corner.shape))
    with torch.no_grad(), pyvolconv.use_backend(name):
        y = pyvolconv.conv3d(x, w, stride=(1, 4, 4))
    for got, corner in zip(corners(y, HEIGHT // 4, WIDTH // 4), corners(x, HEIGHT, WIDTH), strict=True):
        assert_close(got, F.conv3d(corner.float(), w.float(), stride=(1, 4, 4)).to(x.dtype))
