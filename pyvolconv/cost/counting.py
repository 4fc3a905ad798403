"""Work of a network, counted: floating-point operations and least bytes of every layer and pass.

The model is run once on fake tensors (shapes without data), and each operator that it calls is counted, so
functional calls, fused modules and recurrent layers need no table of module types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PassCost:
    """Work of one pass of one layer on the whole batch.

    Attributes:
        flops: floating-point operations, an FMA counted as two; a comparison or an exponential counts as one.
        min_bytes: each operand read once, the result written once.
    """

    flops: int
    min_bytes: int


@dataclass(frozen=True)
class LayerCost:
    """Work of one operator of one layer.

    Attributes:
        layer: qualified name of the innermost module, as `model.named_modules()` says it; "" for the root module
            and "loss" for what runs after the model.
        kind: "conv", "linear", "lstm", "activation", "pool", "norm", "dropout", "loss", "optimizer", "view", "other".
        op: the operator, e.g. "aten.convolution".
        passes: "forward" always; when a gradient is needed, "grad_input" and "grad_weight" of operators with a
            weight (only those that the network needs: the first layer has no grad_input), "backward" of others;
            "update" of the optimizer.
        weights: number of weights multiplied with data (biases are not among them).
        weight_uses: how often each of them is used per sample: once per output voxel in a convolution, once per
            frame in a recurrent layer; 0 without weights.
        problem: `str(ConvProblem)` of a convolution, None otherwise.
        exact: False where the operator is unknown and one operation per result value is assumed.
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

    Nothing is computed: parameters, buffers and the random state stay as they are.

    Args:
        model: any module of one tensor argument.
        example_input: (N, ...) a batch; only shape, dtype, device and memory format matter.
        loss: from the model's output to a scalar; counted as layer "loss". Targets may be real tensors.

    Returns:
        One entry per operator that does work, in the order of running.
    """
    raise NotImplementedError


def count_optimizer(optimizer: torch.optim.Optimizer) -> LayerCost:
    """Work of one `optimizer.step()`, pass "update", for SGD (with or without momentum) and Adam(W).

    Raises:
        ValueError: an optimizer of another class.
    """
    raise NotImplementedError
