"""Each test of this folder that names `kind` or `name` runs for everything that has to behave as torch's modules."""

from __future__ import annotations

import pytest

from .layers import KINDS, NAMES


@pytest.fixture(params=KINDS)
def kind(request):
    """A module of this package, or one of torch's after `accelerate`."""
    return request.param


@pytest.fixture(params=NAMES)
def name(request):
    return request.param
