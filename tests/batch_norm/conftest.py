"""Small calls go our way here."""

from __future__ import annotations

import pytest

from pyvolconv import batch_norm

from ..instance_norm.conftest import nodes

__all__ = ["nodes"]


@pytest.fixture
def at_any_size(monkeypatch):
    """Where torch is faster, too."""
    for name in ("FEWEST_VALUES", "FEWEST_VOXELS", "FEWEST_VOXELS_ALONE"):
        monkeypatch.setattr(batch_norm, name, 0)
