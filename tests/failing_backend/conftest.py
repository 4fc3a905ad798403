"""The planted backend, in the registry for one test."""

from __future__ import annotations

import pytest

from pyvolconv import dispatch
from pyvolconv.backends import registry as registry_module
from pyvolconv.backends.registry import REGISTRY

from ..harness import EXTENSION, MISSING
from .planted import Planted


@pytest.fixture
def planted(monkeypatch):
    """Preferred to all others, and able to do what `cpp.direct` does until it is told to fail."""
    if EXTENSION is None:
        pytest.skip(MISSING)
    backend = Planted()
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for module in (dispatch, registry_module):
        monkeypatch.setattr(module, "REGISTRY", (backend, *REGISTRY))
    dispatch.forget_choices()
    return backend
