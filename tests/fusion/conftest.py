"""Which pass a model ran."""

from __future__ import annotations

import pytest

import pyvolconv
from pyvolconv import chains


@pytest.fixture
def passes(monkeypatch):
    """Counts calls of the fused pass and of the plain convolution."""
    counts = {"fused": 0, "plain": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(chains, "conv3d_max_pool", counting("fused", pyvolconv.conv3d_max_pool))
    monkeypatch.setattr(pyvolconv.nn, "conv3d", counting("plain", pyvolconv.conv3d))
    return counts
