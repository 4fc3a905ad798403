"""Memory formats of results and gradients beside torch's."""

from __future__ import annotations

import itertools

import pytest
import torch

from ..closeness import assert_close
from .layers import FORMATS, pair, used_strides

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
MIXED = [formats for formats in itertools.product(FORMATS, FORMATS) if torch.channels_last_3d in formats]
# Channels, kernel, voxels: with single channels and single voxels both orders of axes are true of a tensor.
SIZES = [
    ((4, 8), 3, (5, 6, 7)),
    ((4, 4), 1, (5, 6, 7)),
    ((1, 1), 3, (5, 6, 7)),
    ((4, 1), 3, (5, 1, 7)),
    ((1, 4), 1, (1, 1, 6)),
    ((4, 8), 3, (1, 1, 1)),
]


def results(layer, x):
    """The result and the `.grad` of input and parameters, for a gradient with the result's strides."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.ones_like(y))
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contiguous_operands(kind, name, dtype):
    """Every stride is torch's, those of axes of size 1 too, which `view` and `is_contiguous` look at."""
    for channels, kernel_size, size in SIZES:
        ours, theirs = pair(kind, name, *channels, kernel_size, padding=kernel_size // 2, dtype=dtype)
        for shape in ((2, channels[0], *size), (1, channels[0], *size), (channels[0], *size)):
            x = torch.randn(shape, dtype=torch.float64).to(dtype)
            for got, expected in zip(results(ours, x), results(theirs, x), strict=True):
                assert got.stride() == expected.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formats", MIXED, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_channels_last_operands(kind, name, groups, formats, dtype):
    """Results keep the format. Torch's do too, but where it has no kernel for it: float64, complex, one small sample.

    `.grad` has the strides of its leaf in both: of what else DistributedDataParallel warns.
    """
    ours, theirs = pair(kind, name, 4, 8, 3, padding=1, groups=groups, dtype=dtype)
    for layer in (ours, theirs):
        layer.to(memory_format=formats[1])
    for batch in (1, 2):
        x = torch.randn(batch, 4, 5, 6, 7, dtype=torch.float64).to(dtype).to(memory_format=formats[0])
        (y, *gradients), (expected, *theirs_gradients) = results(ours, x), results(theirs, x)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        falls_back = batch == 1 or dtype != torch.float32 or not torch.backends.mkldnn.is_available()
        assert used_strides(expected) == used_strides(y) or (falls_back and expected.is_contiguous())
        leaves = [x, *theirs.parameters()]
        for leaf, got, wanted in zip(leaves, gradients, theirs_gradients, strict=True):
            assert used_strides(got) == used_strides(wanted) == used_strides(leaf)


def test_float64_keeps_channels_last_where_torch_falls_back(kind, name):
    """A difference: torch's result is contiguous, so that `view` works on it; ours needs `reshape` there."""
    ours, theirs = pair(kind, name, 4, 8, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    assert_close(ours(x).view(2, -1), theirs(x).view(2, -1))
    x = x.to(memory_format=torch.channels_last_3d)
    expected = theirs(x).view(2, -1)
    assert_close(ours(x).reshape(2, -1), expected)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        ours(x).view(2, -1)
    single = theirs.float()(x.float())
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        single.view(2, -1)
