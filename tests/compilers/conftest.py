"""A compiler without memory."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    """Code compiled for other tests would count towards the limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
