"""Chains in a torch.fx graph: found, and replaced by one call.

A *line* is a run of nodes in which each one is fed by the one before and by nothing else, and feeds nobody else. Its
nodes call modules, or functions that have a module of the same meaning (`relu(x)` and `nn.ReLU()`), so a line reads as
the list of modules that `chains` works on. What a line computes depends on what enters it alone, so all of it may run
where its first node stood.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .chains import run
from .links import flatten, is_plain_sequential, link_of

Called = list[tuple[str, nn.Module]]
"""(name, module) of what a node calls, in order."""


def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace)


def _leaky_relu_in_place(input: Any, negative_slope: Any = 0.01) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace=True)


def _gelu(input: Any, approximate: Any = "none") -> nn.Module:
    return nn.GELU(approximate)


def _max_pool3d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> nn.Module:
    return nn.MaxPool3d(
        kernel_size, kernel_size if stride in (None, [], ()) else stride, padding, dilation, return_indices, ceil_mode
    )


def _relu(input: Any, inplace: Any = False) -> nn.Module:
    return nn.ReLU()


def _silu(input: Any, inplace: Any = False) -> nn.Module:
    return nn.SiLU()


_MODULE_OF: dict[Any, Callable[..., nn.Module]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    "relu": _relu,
    "relu_": _relu,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_in_place,
    F.silu: _silu,
    F.gelu: _gelu,
    F.max_pool3d: _max_pool3d,
    torch.max_pool3d: _max_pool3d,
}


def called_by(node: fx.Node, root: nn.Module) -> Called:
    """What a node calls on one tensor that another node made; empty for any other node."""
    if not node.args or node.all_input_nodes != [node.args[0]]:
        return []
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if len(node.args) > 1 or node.kwargs:
            return []
        if is_plain_sequential(module):
            return [(f"{node.target}.{name}", inner) for name, inner in flatten(cast("nn.Sequential", module))]
        return [(str(node.target), module)]
    build = _MODULE_OF.get(node.target) if node.op in ("call_function", "call_method") else None
    if build is None:
        return []
    try:
        arguments = inspect.signature(build).bind(*node.args, **node.kwargs)
    except TypeError:
        return []
    return [(f"{build.__name__[1:]}()", build(*arguments.args, **arguments.kwargs))]


def lines_of(graph: fx.Graph, root: nn.Module) -> Iterator[list[fx.Node]]:
    """The longest lines of a graph, of two nodes or more."""
    times = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def is_readable(node: fx.Node) -> bool:
        called = called_by(node, root)
        has_parameters = any(link_of(module) in ("convolution", "normalization") for _, module in called)
        return bool(called) and not (has_parameters and times[node.target] > 1)

    def follower(node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and is_readable(users[0]) else None

    entered: set[fx.Node] = set()
    for node in graph.nodes:
        if node in entered or not is_readable(node):
            continue
        line = [node]
        while (following := follower(line[-1])) is not None:
            line.append(following)
        entered.update(line)
        if len(line) > 1:
            yield line


def replace(graph: fx.Graph, nodes: Sequence[fx.Node], root: nn.Module) -> None:
    """Put one call in the place of neighbours on a line."""
    # What the graph's code passes in are the modules of the owner at hand; functions have one of their own.
    functions = [None if node.op == "call_module" else called_by(node, root)[0][1] for node in nodes]

    def run_line(x: Tensor, *modules: nn.Module) -> Any:
        flat: list[nn.Module] = []
        owned = iter(modules)
        for function in functions:
            module = next(owned) if function is None else function
            if is_plain_sequential(module):
                flat += [inner for _, inner in flatten(cast("nn.Sequential", module))]
            else:
                flat.append(module)
        return run(flat, x)

    with graph.inserting_before(nodes[0]):
        modules = [graph.get_attr(str(node.target)) for node in nodes if node.op == "call_module"]
        call = graph.call_function(run_line, (nodes[0].args[0], *modules))
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
