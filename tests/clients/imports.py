"""Imports of packages that look for others which do not work here.

* torchvision: what PyPI has of it is built for CUDA and does not load beside torch for the CPU ("operator
  torchvision::nms does not exist"), whether or not something has installed it. No network here computes with it, but
  `pytorchvideo.models.head` imports a class of it, and `transformers`, which `diffusers` imports, needs it to work
  where it is found.
* kernels: a package that both probe for. With the repository's root on sys.path they find our folder of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

OUR_KERNELS = Path(__file__).parents[2] / "kernels" / "__init__.py"


class RoIAlign:
    """A layer of detection heads: only its name is wanted here, and it says so should that change."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("torchvision is only a name here: install one that was built for this torch")


@cache
def torchvision_loads() -> bool:
    """Whether there is a torchvision that works."""
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):
        _forget("torchvision")
        return False
    return True


@contextmanager
def named_torchvision() -> Iterator[None]:
    """In this block `from torchvision.ops import RoIAlign` works: with the real one or by its name."""
    if torchvision_loads():
        yield
        return
    package, operators = ModuleType("torchvision"), ModuleType("torchvision.ops")
    package.ops, operators.RoIAlign = operators, RoIAlign  # type: ignore[attr-defined]
    sys.modules.update({"torchvision": package, "torchvision.ops": operators})
    try:
        yield
    finally:
        _forget("torchvision")


@contextmanager
def only_what_works() -> Iterator[None]:
    """In this block a torchvision that does not load is not found, and neither is our own folder as `kernels`."""
    found = importlib.util.find_spec("kernels")
    hidden = [] if torchvision_loads() else ["torchvision"]
    if found is not None and found.origin == str(OUR_KERNELS):
        hidden.append("kernels")
    # None is how the import system writes down that there is no such module.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            _forget(name)


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
