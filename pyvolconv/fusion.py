"""Where a model's chains are, and classes that run them: `accelerate` swaps these in, `revert` takes them out.

Two kinds of code call modules one after the other so plainly that the chain can be proven:

    nn.Sequential   (a subclass too, if it leaves `forward` alone) runs its children by `chains.run`
    forward code    of any other module, if `straight_forward` can read it; the part of the graph that is a chain is
                    replaced by one call of `chains.run`, and the graph runs while all that it was read from holds

Both look at the modules anew in every call. Modules that stand in several places of the model, or share a parameter
with another module, are left alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .chains import describe, run
from .elsewhere import script_as
from .fused_graph import called_by, lines_of, replace
from .links import (
    chain_length,
    flatten,
    is_plain_sequential,
    link_of,
    needs_every_module,
    original_class,
)
from .straight_forward import Reading, UnprovenError, read_forward


class FusedSequential(nn.Sequential):
    """`nn.Sequential` that runs chains among its children in one pass; see `chains`.

    Class attributes:
        left_alone: paths of modules, relative to this one, that are called as they are.
    """

    left_alone: frozenset[str] = frozenset()

    def _run(self, input: Any) -> Any:
        if needs_every_module() or not is_plain_sequential(self):
            return super().forward(input)  # type: ignore[no-untyped-call]
        items = list(flatten(self))
        left_alone = type(self).left_alone
        return run([module for _, module in items], input, lambda index: items[index][0] in left_alone)

    forward = script_as(nn.Sequential.forward, _run)


STARTS = ("convolution", "normalization", "instance normalization")
"""Links that a chain may start with."""


@dataclass(frozen=True)
class Site:
    """A chain that was found.

    Attributes:
        owner: path of the module whose forward calls it.
        chain: (path, module) of each link; a function called in forward code stands there by its name.
    """

    owner: str
    chain: tuple[tuple[str, nn.Module], ...]

    def __str__(self) -> str:
        return describe([module for _, module in self.chain])


@dataclass
class Findings:
    """What fusing a model means.

    Attributes:
        sites: path of a convolution or norm -> the chain that it starts.
        classes: path of a module -> what its class becomes: (base or None, members of the derived class).
        unproven: path of a module -> why its forward was not read.
        graphs: path of a module -> the graph of its forward.
        shared: paths of modules that stand in several places or share a parameter.
    """

    sites: dict[str, Site]
    classes: dict[str, tuple[type[nn.Module] | None, dict[str, Any]]]
    unproven: dict[str, str]
    graphs: dict[str, fx.Graph]
    shared: set[str]


def find(model: nn.Module) -> Findings:
    """Every chain of a model, in whatever mode its modules are; the model is only looked at."""
    findings = Findings({}, {}, {}, {}, _shared(model))
    for path, module in model.named_modules():
        if is_parametrized(module):
            # Its class was made for it at run time, and what made it expects to find it.
            continue
        if is_plain_sequential(module):
            _find_in_sequential(path, module, findings)
        elif (
            link_of(module) is None
            and _has_code_of_its_own(module)
            and any(link_of(inner) in STARTS for inner in module.modules())
        ):
            try:
                _find_in_forward(path, module, findings)
            except UnprovenError as error:
                findings.unproven[path] = f"{original_class(module).__name__}.forward {error}"
    return findings


def _shared(model: nn.Module) -> set[str]:
    places = list(model.named_modules(remove_duplicate=False))
    times = Counter(id(module) for _, module in places)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {
        path
        for path, module in places
        if link_of(module) in ("convolution", "normalization")
        and (
            times[id(module)] > 1
            or any(owners[id(value)] > 1 for value in module._parameters.values() if value is not None)
        )
    }


def _has_code_of_its_own(module: nn.Module) -> bool:
    return original_class(module).forward.__module__.split(".")[0] not in ("torch", "pyvolconv")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def chains_among(modules: Sequence[tuple[str, nn.Module]], shared: set[str]) -> Iterator[tuple[int, int]]:
    """(start, length) of the chains among (path, module) pairs that are called in this order."""

    def is_left_alone(index: int) -> bool:
        return modules[index][0] in shared

    position = 0
    bare = [module for _, module in modules]
    while position < len(modules):
        length = chain_length(bare, position, is_left_alone, in_any_mode=True)
        last = position + length - 1
        if link_of(bare[last]) == "normalization" and length > 1:
            # In training mode another chain starts there.
            length += chain_length(bare, last, is_left_alone, in_any_mode=True) - 1
        if length > 1:
            yield position, length
        position += length


def _sites(owner: str, chain: tuple[tuple[str, nn.Module], ...]) -> Iterator[tuple[str, Site]]:
    """(path of the first link, chain) of the chains that start in one of `chains_among`: in training another may."""
    bare = [module for _, module in chain]
    for start, module in enumerate(bare):
        if start == 0 or link_of(module) == "normalization":
            length = chain_length(bare, start, in_any_mode=True)
            if length > 1:
                yield chain[start][0], Site(owner, chain[start : start + length])


def _find_in_sequential(path: str, module: nn.Module, findings: Findings) -> None:
    assert isinstance(module, nn.Sequential)
    items = [(_join(path, name), inner) for name, inner in flatten(module)]
    found = [tuple(items[start : start + length]) for start, length in chains_among(items, findings.shared)]
    for chain in found:
        for start, site in _sites(path, chain):
            findings.sites.setdefault(start, site)
    if found:
        left_alone = frozenset(name for name, _ in flatten(module) if _join(path, name) in findings.shared)
        findings.classes[path] = (FusedSequential, {"left_alone": left_alone})


def _find_in_forward(path: str, module: nn.Module, findings: Findings) -> None:
    original = original_class(module)
    if "forward" in module.__dict__ or original.__call__ is not nn.Module.__call__:
        raise UnprovenError("is not all that calling the module runs")
    readings = [read_forward(module, original.forward, module.training)]
    if ("", "training") in readings[0].guards:
        readings.append(read_forward(module, original.forward, not module.training))
    findings.graphs[path] = copy.deepcopy(readings[0].graph)
    fused = [reading for reading in readings if _fuse_graph(path, module, reading.graph, findings)]
    if fused:
        forward = _guarded([(reading, _compile(reading.graph)) for reading in fused], original.forward)
        findings.classes[path] = (None, {"forward": forward})


def _fuse_graph(path: str, root: nn.Module, graph: fx.Graph, findings: Findings) -> bool:
    """Replace the chains of a graph, each by one call; whether there were any."""
    replaced: set[fx.Node] = set()
    for line in list(lines_of(graph, root)):
        calls = [(_join(path, name), module, node) for node in line for name, module in called_by(node, root)]
        links = [(place, module) for place, module, _ in calls]
        for start, length in chains_among(links, findings.shared):
            nodes = list(dict.fromkeys(node for _, _, node in calls[start : start + length]))
            is_left_alone = any(place in findings.shared for place, _, node in calls if node in nodes)
            # A chain inside of one node is a plain Sequential's own affair.
            if len(nodes) > 1 and replaced.isdisjoint(nodes) and not is_left_alone:
                findings.sites.update(_sites(path, tuple(links[start : start + length])))
                replaced.update(nodes)
                replace(graph, nodes, root)
    return bool(replaced)


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    python = graph.python_code("self")
    namespace: dict[str, Any] = dict(python.globals)
    exec(compile(python.src, "<pyvolconv: fused forward>", "exec"), namespace)
    code: Callable[..., Any] = namespace["forward"]
    return code


def _guarded(
    programs: Sequence[tuple[Reading, Callable[..., Any]]], original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and not needs_every_module():
            for reading, code in programs:
                if reading.holds(self, args):
                    return code(self, *args)
        return original(self, *args, **kwargs)

    return script_as(original, forward)
