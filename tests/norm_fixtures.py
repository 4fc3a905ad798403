"""Fixtures of the tests of norms: which calls went our way, and small ones too."""

from __future__ import annotations

import pytest

from pyvolconv import batch_norm
from pyvolconv.instance_norm import _Call


@pytest.fixture
def calls(monkeypatch):
    """The calls that ran in our pass, in order."""
    seen = []
    forward = _Call.forward

    def counted(call, *arguments):
        seen.append(call)
        return forward(call, *arguments)

    monkeypatch.setattr(_Call, "forward", counted)
    return seen


@pytest.fixture
def at_any_size(monkeypatch):
    """Batch normalization in our pass where torch is faster, too."""
    for name in ("FEWEST_VALUES", "FEWEST_VOXELS", "FEWEST_VOXELS_ALONE"):
        monkeypatch.setattr(batch_norm, name, 0)
