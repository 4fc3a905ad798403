"""Reading a module's `forward` as a torch.fx graph, with proof that the graph says all that the code does.

`torch.fx.symbolic_trace` runs `forward` once and keeps the tensor operations it saw. What else the code did or looked
at is lost: a flag that decided a branch, a `with torch.no_grad()`, a counter, a random number. Here `forward` runs once
as well, but in a world of stand-ins, and whatever they do not understand ends the attempt, with the reason:

    self, its children    hand out children, parameters and plain values; every value read becomes a *guard*
    arguments             torch.fx proxies, which refuse to decide a branch; those with a default have their default
    global names          torch, torch.nn.functional, math, plain values (guarded), functions (read in the same way)
    torch's functions     have to get a proxy, so that what they return is recorded and not a constant

Statements that act on anything else (assignment to attributes, `with`, `try`, nested functions) are refused. A graph
stands for a call while its guards hold, that is while everything that the code looked at is as it was, and for tensors
in place of the arguments without a default.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format)
_PURE_BUILTINS = frozenset({"abs", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min", "range"})
_PURE_BUILTINS |= {"reversed", "sum", "tuple", "zip"}
_REFUSED_OPERATIONS = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global name",
    "DELETE_GLOBAL": "deletes a global name",
    "BEFORE_WITH": "has a `with` block",
    "SETUP_WITH": "has a `with` block",
    "LOAD_SPECIAL": "has a `with` block",
    "PUSH_EXC_INFO": "has a `try` block",
    "SETUP_FINALLY": "has a `try` block",
    "IMPORT_NAME": "imports a module",
    "MAKE_FUNCTION": "has a function, lambda or comprehension inside",
    "YIELD_VALUE": "is a generator",
    "RETURN_GENERATOR": "is a generator",
}


class UnprovenError(Exception):
    """`forward` does something that a graph could not repeat; the message says what."""


Guard = tuple[str, str, Any]
"""(path of a module, what is read of it, what was found): a guard holds while that is what one finds."""


@dataclass(eq=False)
class Reading:
    """A forward as a graph, and all that it looked at."""

    graph: fx.Graph
    parameters: int = 0
    guards: dict[tuple[str, str], Any] = field(default_factory=dict)
    globals_read: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def holds(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether forward(*args) of `module`, which is of the class that was read, is what the graph says."""
        return (
            len(args) == self.parameters
            and all(isinstance(arg, torch.Tensor) for arg in args)
            and all(_is_same(_look(module, path, name), found) for (path, name), found in self.guards.items())
            and all(_is_same(namespace.get(name), value) for namespace, name, value in self.globals_read)
        )


def _is_same(value: Any, found: Any) -> bool:
    return type(value) is type(found) and bool(value == found)


def _look(root: nn.Module, path: str, name: str) -> Any:
    module: Any = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part)
        if module is None:
            return None
    if name == "":
        return tuple(module._modules)
    value = getattr(module, name, None)
    if isinstance(value, nn.Module):
        return nn.Module
    return torch.Tensor if isinstance(value, torch.Tensor) else value


def read_forward(module: nn.Module, forward: Callable[..., Any], training: bool) -> Reading:
    """The graph of `forward(module, ...)`; children are called, not entered.

    Args:
        module: the module.
        forward: its class's function.
        training: what `self.training` is taken to be.

    Raises:
        UnprovenError: the graph would not say all that the code does.
    """
    reading = Reading(fx.Graph())
    reader = _Reader(module, reading, training)
    arguments: list[Any] = [reader.stand_in(module, "")]
    _, *parameters = inspect.signature(forward).parameters.values()
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UnprovenError(f"takes {parameter}")
        if parameter.default is parameter.empty:
            arguments.append(reader.proxy(reading.graph.placeholder(parameter.name)))
            reading.parameters += 1
    own = reader.function(forward)
    try:
        result = own(*arguments)
        reading.graph.output(reader.tracer.create_arg(result))
    except UnprovenError:
        raise
    except fx.proxy.TraceError as error:
        raise UnprovenError("branches or loops on a value of its input") from error
    except Exception as error:
        raise UnprovenError(f"cannot be followed: {type(error).__name__}: {error}".split("\n")[0]) from error
    return reading


class _Reader:
    def __init__(self, root: nn.Module, reading: Reading, training: bool) -> None:
        self.root, self.reading, self.training = root, reading, training
        self.tracer = fx.proxy.GraphAppendingTracer(reading.graph)
        self.stand_ins: dict[str, _StandIn] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self.tracer)

    def stand_in(self, module: nn.Module, path: str) -> _StandIn:
        if path not in self.stand_ins:
            self.stand_ins[path] = _StandIn(self, module, path)
        return self.stand_ins[path]

    def guard(self, path: str, name: str, value: Any) -> Any:
        self.reading.guards[path, name] = value
        return value

    def read(self, module: nn.Module, path: str, name: str) -> Any:
        """What `module.<name>` is in the world of stand-ins."""
        full = f"{path}.{name}" if path else name
        if name == "training" and module is self.root:
            return self.guard(path, name, self.training)
        if isinstance(inspect.getattr_static(type(module), name, None), property):
            raise UnprovenError(f"reads self.{full}, a property")
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            if name not in module._modules:
                raise UnprovenError(f"reads self.{full}, a module that is not registered as a child")
            self.guard(path, name, nn.Module)
            return self.stand_in(value, full)
        if isinstance(value, torch.Tensor):
            if name not in module._parameters and name not in module._buffers:
                raise UnprovenError(f"reads self.{full}, a tensor that is neither parameter nor buffer")
            self.guard(path, name, torch.Tensor)
            return self.proxy(self.reading.graph.get_attr(full))
        if is_plain(value):
            return self.guard(path, name, value)
        if inspect.ismethod(value) and value.__self__ is module and module is self.root and name not in vars(module):
            return types.MethodType(self.function(value.__func__), self.stand_in(module, path))
        raise UnprovenError(f"reads self.{full}, which is no module, parameter or plain value")

    def function(self, function: Any) -> Callable[..., Any]:
        """The same code with stand-ins for the global names that it reads."""
        if not isinstance(function, types.FunctionType) or function.__module__.split(".")[0] == "torch":
            raise UnprovenError(f"calls {_name(function)}, which is not the module's own code")
        if not is_plain((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
            raise UnprovenError(f"a default of {function.__name__}() is no plain value")
        if function.__closure__:
            raise UnprovenError(f"{function.__name__}() uses {', '.join(function.__code__.co_freevars)} from around it")
        namespace: dict[str, Any] = {"__builtins__": {}}
        for instruction in dis.get_instructions(function):
            refused = _REFUSED_OPERATIONS.get(instruction.opname)
            if refused:
                raise UnprovenError(f"{function.__name__}() {refused}")
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name = str(instruction.argval)
                namespace[name] = self.global_name(function, name)
        copy = types.FunctionType(
            function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy

    def global_name(self, function: types.FunctionType, name: str) -> Any:
        if name not in function.__globals__:
            if name in _PURE_BUILTINS:
                return getattr(builtins, name)
            raise UnprovenError(f"{function.__name__}() uses {name}")
        value = function.__globals__[name]
        if any(value is known for known in (torch, F, torch.nn, math)):
            return _Namespace(value)
        if is_plain(value):
            self.reading.globals_read.append((function.__globals__, name, value))
            return value
        if (getattr(value, "__module__", None) or "").split(".")[0] == "torch":
            return recorded(value)
        if isinstance(value, types.FunctionType):
            self.reading.globals_read.append((function.__globals__, name, value))
            return self.function(value)
        raise UnprovenError(f"{function.__name__}() uses {name}")


class _StandIn:
    """A module in the world of stand-ins."""

    __slots__ = ("_module", "_path", "_reader")

    def __init__(self, reader: _Reader, module: nn.Module, path: str) -> None:
        for name, value in (("_reader", reader), ("_module", module), ("_path", path)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return self._reader.read(self._module, self._path, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnprovenError(f"sets self.{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _has_proxy((args, kwargs)):
            raise UnprovenError(f"calls self.{self._path} without a tensor of its input")
        return self._reader.tracer.create_proxy("call_module", self._path, args, kwargs)

    def _children(self) -> list[str]:
        if not isinstance(self._module, (nn.Sequential, nn.ModuleList)):
            raise UnprovenError(f"takes self.{self._path} for a list")
        names: list[str] = list(self._reader.guard(self._path, "", tuple(self._module._modules)))
        return names

    def __len__(self) -> int:
        return len(self._children())

    def __bool__(self) -> bool:
        raise UnprovenError(f"asks whether self.{self._path} is true")

    def __iter__(self) -> Iterator[Any]:
        return iter([self._reader.read(self._module, self._path, name) for name in self._children()])

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class _Namespace:
    """A module of functions (torch, torch.nn.functional, math)."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if value is F or value is torch.nn:
            return _Namespace(value)
        if is_plain(value) or self._module is math:
            return value
        return recorded(value)


def recorded(function: Any) -> Callable[..., Any]:
    """A function of torch's that may only be called with proxies, and has to be recorded."""
    if not callable(function) or inspect.isclass(function):
        raise UnprovenError(f"uses {_name(function)}")

    def call(*args: Any, **kwargs: Any) -> Any:
        if not _has_proxy((args, kwargs)):
            raise UnprovenError(f"calls {_name(function)} without a tensor of its input")
        result = function(*args, **kwargs)
        if not isinstance(result, fx.Proxy):
            raise UnprovenError(f"calls {_name(function)}, which torch.fx does not record")
        return result

    return call


def is_plain(value: Any) -> bool:
    """Whether a value can be compared later and nobody can change it in the meantime."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


def _has_proxy(arguments: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(arguments))


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
