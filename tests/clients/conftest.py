"""Each client in turn, where its package is installed."""

from __future__ import annotations

import importlib.util

import pytest

from ..norm_fixtures import at_any_size
from .networks import CLIENTS, Client

__all__ = ["at_any_size"]


def require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; CONTRIBUTING.md says how to, without a torchvision that does not load")


@pytest.fixture(params=CLIENTS, ids=lambda client: client.name.replace(" ", "-"))
def client(request: pytest.FixtureRequest) -> Client:
    """Each network, small; what a package that is there cannot do is a failure."""
    require_package(request.param.package)
    return request.param


@pytest.fixture(autouse=True)
def _norms_go_our_way(at_any_size: None) -> None:
    """Although networks are small here."""
