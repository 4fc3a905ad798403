"""Which calls went our way."""

from __future__ import annotations

import pytest

from pyvolconv.instance_norm import _Call


@pytest.fixture
def nodes(monkeypatch):
    """The calls that made a node of ours."""
    seen = []
    forward = _Call.forward

    def counted(call, *arguments):
        seen.append(call)
        return forward(call, *arguments)

    monkeypatch.setattr(_Call, "forward", counted)
    return seen
