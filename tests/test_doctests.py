"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import pyvolconv
import pyvolconv.kernels

MODULES = sorted(
    info.name
    for package in (pyvolconv, pyvolconv.kernels)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.name.endswith(("__main__", "._C"))
)


@pytest.mark.parametrize("name", ["pyvolconv", *dict.fromkeys(MODULES)])
def test_examples_of_module(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, "see the captured output"


def test_examples_are_found():
    names = {"pyvolconv.problem", "pyvolconv.functional", "pyvolconv.nn", "pyvolconv.accelerate", "pyvolconv.dispatch"}
    assert names <= set(MODULES)
    for name in names:
        assert doctest.testmod(importlib.import_module(name)).attempted > 0


@pytest.mark.parametrize("name", pyvolconv.__all__)
def test_public_name_is_documented(name):
    text = inspect.getdoc(getattr(pyvolconv, name)) or ""
    assert text.strip(), f"pyvolconv.{name} has no docstring"
    if name not in ("UnsupportedProblemError", "revert"):
        assert ">>>" in text, f"the docstring of pyvolconv.{name} has no example"
