"""Chains that `accelerate` runs as one pass: torch's outcome for inputs and neighbours that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyvolconv

from .layers import assert_same_outcome, outcome

CHAINS = {
    "pool": lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
    "norm and pool": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2)).eval(),
    "norm": lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6)).eval(),
    "norm of other channels": lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(5)).eval(),
    "norm of one channel": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(1), nn.ReLU()).eval(),
    "activation": lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.LeakyReLU(inplace=True)),
    "overlapping pool": lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.GELU(), nn.MaxPool3d(3, 2, 1)),
    "pool with too much padding": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.ReLU(), nn.MaxPool3d(2, padding=2)),
    "pool of nothing": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.ReLU(), nn.MaxPool3d(0)),
    "pool of two axes": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.ReLU(), nn.MaxPool3d((2, 2))),
    "pool larger than the volume": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.ReLU(), nn.MaxPool3d(5)),
    "wrong padding": lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=-1), nn.ReLU(), nn.MaxPool3d(2)),
}


def inputs():
    yield from (torch.randn(shape) for shape in [(1, 4, 6, 6, 6), (2, 4, 6, 7, 5), (4, 6, 6, 6), (0, 4, 6, 6, 6)])
    yield from (torch.randn(shape) for shape in [(1, 3, 6, 6, 6), (1, 4, 1, 1, 1), (1, 4, 0, 6, 6), (4, 6, 6)])
    yield from (torch.randn(1, 4, 6, 6, 6).to(dtype) for dtype in (torch.float64, torch.int64, torch.complex64))
    yield None


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_outcomes(chain, fuse):
    theirs = CHAINS[chain]()
    ours = pyvolconv.accelerate(copy.deepcopy(theirs), fuse=fuse)
    for x in inputs():
        got, expected = outcome(ours, x), outcome(theirs, x)
        assert_same_outcome(got, expected)
        if isinstance(expected, torch.Tensor) and expected.numel():
            assert got.stride() == expected.stride()
