"""Programs that run where this package may not be installed: TorchScript, traced or compiled, and ONNX.

They consist of torch's own operators, and are what torch would have made of the model without this package.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.jit._builtins import _register_builtin


def is_recorded_for_elsewhere() -> bool:
    """Whether calls made now are written down by `torch.jit.trace` or `torch.onnx.export`.

    Example:
        >>> is_recorded_for_elsewhere()
        False
        >>> torch.jit.trace(lambda x: x + int(is_recorded_for_elsewhere()), torch.zeros(1))(torch.zeros(1))
        tensor([1.])
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return bool(torch._C._is_tracing())


def script_call_as(function: Callable[..., Any], operator: str) -> None:
    """Have TorchScript compile calls of `function` to calls of an operator that takes the same arguments."""
    _register_builtin(function, operator)


def script_as(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, in whose place TorchScript compiles `original`.

    TorchScript takes the source that `__wrapped__` leads to, and looks names up among the globals of what it was given.
    """

    def shim(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    shim = types.FunctionType(shim.__code__, original.__globals__, closure=shim.__closure__)
    return functools.wraps(original)(shim)
