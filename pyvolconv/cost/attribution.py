"""Which layer and which phase of the step an operator belongs to, in forward and in backward.

Autograd gives each node of its graph a sequence number when the forward operator runs, and counts up. Module hooks note
that counter as each module starts and ends, so the numbers that belong to a layer are known without looking at
tensors; in backward the node being evaluated has its number still. This holds for functional calls, fused modules,
views and custom operators alike. Gradient accumulation nodes have no number and are found by their parameter.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

Phase = Literal["forward", "backward", "update", "other"]

OUTSIDE = "step"
LOSS = "loss"
OPTIMIZER = "optimizer"
_RECURRENT_WEIGHT = re.compile(r"(.*)\.weight_[ih]h_(l\d+(?:_reverse)?)")


@dataclass(frozen=True)
class Place:
    """A layer, as `model.named_modules()` names it ("" is the model itself; see the constants above), and a phase."""

    layer: str
    phase: Phase


class Attribution:
    """Follows one model through its steps while in its `with` block; ask `place()` inside an operator.

    Args:
        model: its modules are followed by hooks, which are removed at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._parameter_names: dict[int, str] = {}
        # Kept alive: the address of a freed storage would name the next tensor that gets it.
        self._twins: list[Tensor] = []
        self.begin_step()

    def __enter__(self) -> Attribution:
        self._name_parameters()
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles += [
                module.register_forward_pre_hook(self._enter_hook(name), prepend=True),
                module.register_forward_hook(self._exit_hook(), always_call=True),
            ]
        self._handles += [
            register_optimizer_step_pre_hook(lambda *_: self._mark_update(True)),
            register_optimizer_step_post_hook(lambda *_: self._mark_update(False)),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._twins.clear()

    def begin_step(self) -> None:
        """Forgets the layers of the step before."""
        self._stack: list[str] = []
        self._current = OUTSIDE
        self._updating = False
        # From graph node number starts[i] on, layer owners[i].
        self._starts: list[int] = [0]
        self._owners: list[str] = [OUTSIDE]

    def place(self) -> Place:
        """Layer and phase of the operator that is running now."""
        if self._updating:
            return Place(OPTIMIZER, "update")
        node = torch._C._current_autograd_node()
        # With modules on the stack, a node means that forward is being recomputed (checkpointing).
        if node is not None and not self._stack:
            return Place(self._layer_of_node(node), "backward")
        return Place(self._current, "other" if self._current == OUTSIDE else "forward")

    def parameter_name(self, tensor: Tensor) -> str | None:
        """Qualified name of the parameter that `tensor` is or is a view of; None for any other tensor."""
        if tensor.layout is not torch.strided:
            return None
        return self._parameter_names.get(tensor.untyped_storage()._cdata)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter of the model or a view of one."""
        return self.parameter_name(tensor) is not None

    def also_known_as(self, parameter: Tensor, twin: Tensor) -> None:
        """Lets `twin` (a fake tensor) stand for `parameter`."""
        name = self.parameter_name(parameter)
        if name is not None:
            self._parameter_names[twin.untyped_storage()._cdata] = name
            self._twins.append(twin)

    def sublayer(self, layer: str, kind: str, args: Sequence[Any]) -> str:
        """`layer`, made finer for an operator of `kind` on one recurrent layer: "lstm.l0", "lstm.l1_reverse"."""
        if kind in ("lstm", "gru", "rnn") and isinstance(args[1], Tensor):
            match = _RECURRENT_WEIGHT.fullmatch(self.parameter_name(args[1]) or "")
            if match is not None:
                return f"{match[1]}.{match[2]}"
        return layer

    def _name_parameters(self) -> None:
        for name, parameter in self._model.named_parameters():
            self._parameter_names[parameter.untyped_storage()._cdata] = name

    def _layer_of_node(self, node: Any) -> str:
        if node.name() == "torch::autograd::AccumulateGrad":
            name = self.parameter_name(node.variable)
            return name.rpartition(".")[0] if name is not None else OUTSIDE
        return self._owners[bisect_right(self._starts, node._sequence_nr()) - 1]

    def _become(self, layer: str) -> None:
        self._current = layer
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(layer)

    def _enter_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(name)
            self._become(name)

        return _watching(hook)

    def _exit_hook(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()
            self._become(self._stack[-1] if self._stack else LOSS)

        return _watching(hook)

    def _mark_update(self, updating: bool) -> None:
        self._updating = updating
        self._become(OUTSIDE)


def _watching(hook: Callable[..., None]) -> Callable[..., None]:
    """Marks a hook that changes nothing, so that accelerated modules go on running chains as one pass under it."""
    hook.watches_only = True  # type: ignore[attr-defined]
    return hook
