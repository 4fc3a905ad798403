"""Modules whose `forward` is a call of one `nn.Sequential` of theirs, and nothing more: chains go on through them.

They are read as `straight_forward` reads any code, with guards. `accelerate` gives them a class that says which child
they call; `links.flatten` opens them while the guards hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .links import is_plain_sequential, original_class
from .straight_forward import Reading, UnprovenError, read_forward

_ANY = torch.empty(0)


def wrappers(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """(module, members of the class that it is to have) of every wrapper in a model; the model is only looked at."""
    for module in model.modules():
        original = original_class(module)
        if original.forward.__module__.split(".")[0] in ("torch", "pyvolconv") or is_parametrized(module):
            continue
        if "forward" in module.__dict__ or original.__call__ is not nn.Module.__call__:
            continue
        children = [child for child in module._modules.values() if isinstance(child, nn.Sequential)]
        if not any(is_plain_sequential(child) for child in children):
            continue
        try:
            reading = read_forward(module, original.forward, module.training)
        except UnprovenError:
            continue
        name = _only_call(reading)
        if name is not None and isinstance(module._modules.get(name), nn.Sequential):
            yield module, {"_pyvolconv_passes_on": (name, _holds(reading))}


def _only_call(reading: Reading) -> str | None:
    """The child that is called on the argument and whose result is returned; None where the code is another."""
    nodes = list(reading.graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "call_module", "output"]:
        return None
    argument, call, result = nodes
    is_all = call.args == (argument,) and not call.kwargs and result.args == (call,)
    return str(call.target) if is_all else None


def _holds(reading: Reading) -> Callable[[nn.Module], bool]:
    return lambda module: reading.holds(module, (_ANY,))
