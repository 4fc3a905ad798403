"""Operands of a convolution."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 6, 7)


@pytest.fixture
def w():
    return torch.randn(4, 4, 3, 3, 3)
