"""Work of a network, counted: floating-point operations and least bytes of every layer and pass.

The model and its backward pass run once on fake tensors (shapes without data) and each operator that they call
is counted by `operators`, so functional calls, fused modules and recurrent layers need no table of module types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .assignment import Assigner, Assignment
from .attribution import OPTIMIZER, Attribution


@dataclass(frozen=True)
class PassCost:
    """Work of one pass of one layer on the whole batch.

    Attributes:
        flops: floating-point operations, an FMA counted as two; a comparison or an exponential counts as one.
        min_bytes: each operand read once, the result written once.
    """

    flops: int
    min_bytes: int

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(self.flops + other.flops, self.min_bytes + other.min_bytes)


@dataclass(frozen=True)
class LayerCost:
    """Work of all operators of one kind in one layer.

    Attributes:
        layer: qualified name of the innermost module, as `model.named_modules()` says it; "" for the model itself,
            "loss" for what runs after it, "optimizer"; of a recurrent module each layer and direction has an entry
            ("lstm.l0", "lstm.l0_reverse").
        kind: "conv", "linear", "lstm", "gru", "rnn", "activation", "pool", "norm", "dropout", "loss", "elementwise",
            "memory" (fill, copy), "optimizer", "other".
        op: the operators, forward ones first, e.g. "aten.convolution, aten.convolution_backward".
        passes: "forward"; "grad_input" and "grad_weight" of operators with a weight, "backward" of others, both only
            where the network needs them (the first layer has no grad_input); "update" of the optimizer.
        weights: number of weights multiplied with data (biases are not among them).
        weight_uses: how often each of them is used per sample in the forward pass: once per output voxel in a
            convolution, once per frame in a recurrent layer; 0 without weights.
        problem: `str(ConvProblem)` of a convolution, None otherwise.
        exact: False where an operator is unknown and one operation per result value is assumed.
    """

    layer: str
    kind: str
    op: str
    passes: dict[str, PassCost]
    weights: int
    weight_uses: float
    problem: str | None
    exact: bool

    @property
    def flops(self) -> int:
        """Operations of all passes."""
        return sum(cost.flops for cost in self.passes.values())

    @property
    def min_bytes(self) -> int:
        """Least bytes of all passes."""
        return sum(cost.min_bytes for cost in self.passes.values())

    def to_dict(self) -> dict[str, object]:
        """All attributes and the totals as plain values for JSON."""
        return {**asdict(self), "flops": self.flops, "min_bytes": self.min_bytes}


def count_model(
    model: nn.Module, example_input: Tensor, loss: Callable[[Tensor], Tensor] | None = None
) -> list[LayerCost]:
    """Work of one training step of `model` (without the optimizer) on a batch like `example_input`.

    Nothing is computed: parameters, gradients, buffers and the random state stay as they are.

    Args:
        model: any module of one tensor argument with one tensor result.
        example_input: (N, ...) a batch; only shape, dtype, device and memory format matter.
        loss: from the model's output to a scalar; counted as layer "loss". Its targets may be real tensors.

    Returns:
        One entry per layer and kind of operator that does work, in the order of running.

    Example:
        >>> (cost,) = count_model(nn.Conv3d(1, 4, 3, bias=False), torch.zeros(2, 1, 8, 8, 8))
        >>> cost.passes["forward"].flops == 2 * (2 * 4 * 6**3) * 27, cost.weight_uses == 6**3
        (True, True)
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Attribution(model) as attribution:
        counter = _Counter(attribution)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in model.parameters():
            attribution.also_known_as(parameter, fake.from_tensor(parameter))
        buffers: dict[str, Tensor] = {name: fake.from_tensor(buffer) for name, buffer in model.named_buffers()}
        x = fake.from_tensor(example_input)
        with counter, torch.enable_grad():
            output = torch.func.functional_call(model, buffers, (x,))
            if loss is not None:
                output = loss(output)
        if output.requires_grad:
            cotangent = torch.empty_like(output)
            inputs = parameters + ([x] if x.requires_grad else [])
            with counter:
                torch.autograd.grad(output, inputs, cotangent, allow_unused=True)
    return counter.costs(example_input.shape[0])


def count_optimizer(optimizer: torch.optim.Optimizer) -> LayerCost:
    """Work of one `optimizer.step()`, pass "update", for SGD, Adam and AdamW, by their textbook formulas.

    Per parameter: SGD one FMA, momentum and weight decay one more each. Adam 13: both moments 3 + 4, root,
    correction and epsilon 3, update 3; weight decay 2, amsgrad 1. Bytes: gradient and parameter read,
    parameter written, each moment read and written.

    Raises:
        ValueError: an optimizer of another class.

    Example:
        >>> count_optimizer(torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)).flops
        16
    """
    flops = moved = 0
    for group in optimizer.param_groups:
        decay = 2 if group.get("weight_decay") else 0
        if isinstance(optimizer, torch.optim.SGD):
            moments = 1 if group["momentum"] else 0
            per_value = 2 + 2 * moments + decay
        elif isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            moments = 3 if group["amsgrad"] else 2
            per_value = 13 + (1 if group["amsgrad"] else 0) + decay
        else:
            raise ValueError(f"{type(optimizer).__name__} is not counted; expected SGD, Adam or AdamW")
        for parameter in group["params"]:
            flops += per_value * parameter.numel()
            moved += (3 + 2 * moments) * parameter.numel() * parameter.element_size()
    name = type(optimizer).__name__
    return LayerCost(OPTIMIZER, "optimizer", name, {"update": PassCost(flops, moved)}, 0, 0.0, None, True)


@dataclass
class _Sum:
    """What has been counted so far for one layer and kind."""

    operators: dict[str, None] = field(default_factory=dict)
    passes: dict[str, PassCost] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    multiply_adds: int = 0
    problem: str | None = None
    exact: bool = True


class _Counter(TorchDispatchMode):
    def __init__(self, attribution: Attribution) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._attribution = attribution
        self._assigner = Assigner(attribution)
        self._sums: dict[tuple[str, str], _Sum] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        call = self._assigner.assign(func, args, result)
        if any(work.flops or work.min_bytes for _, work in call.works):
            self._add(call)
        return result

    def costs(self, batch: int) -> list[LayerCost]:
        return [
            LayerCost(
                layer=layer,
                kind=kind,
                op=", ".join(total.operators),
                passes=total.passes,
                weights=sum(total.weights.values()),
                weight_uses=total.multiply_adds / (sum(total.weights.values()) * batch) if total.weights else 0.0,
                problem=total.problem,
                exact=total.exact,
            )
            for (layer, kind), total in self._sums.items()
        ]

    def _add(self, call: Assignment) -> None:
        total = self._sums.setdefault((call.layer, call.kind), _Sum())
        total.operators[call.operator] = None
        total.exact = total.exact and call.exact
        for pass_, work in call.works:
            total.passes[pass_] = total.passes.get(pass_, PassCost(0, 0)) + PassCost(work.flops, work.min_bytes)
            if call.phase != "forward":
                continue
            total.multiply_adds += work.multiply_adds
            if work.problem is not None:
                total.problem = str(work.problem)
            for tensor in work.weights:
                name = self._attribution.parameter_name(tensor) or f"computed, shape {tuple(tensor.shape)}"
                total.weights[name] = tensor.numel()
