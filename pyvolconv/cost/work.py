"""What one operator call costs, as values: the words that counting and profiling share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import ConvProblem, Pass


@dataclass(frozen=True)
class Work:
    """A part of an operator call that belongs to one pass.

    Attributes:
        pass_: "forward", "grad_input", "grad_weight"; None where the operator alone does not tell (the caller knows
            whether it ran in forward or backward).
        flops, min_bytes: see `operators`.
        problem: of a convolution.
        weights: the operands that hold weights.
        multiply_adds: of data with weights.
    """

    pass_: Pass | None
    flops: int
    min_bytes: int
    problem: ConvProblem | None = None
    weights: tuple[Tensor, ...] = ()
    multiply_adds: int = 0


@dataclass(frozen=True)
class OperatorCost:
    """Kind of an operator, its work by pass, and whether that is counted by a formula of its own."""

    kind: str
    works: tuple[Work, ...]
    exact: bool = True


IsWeight = Callable[[Tensor], bool]
"""Whether a tensor is a parameter or a view of one."""

Formula = Callable[[Sequence[Any], Any, IsWeight], OperatorCost]
"""Cost of an operator call from its positional arguments, its result and what is a weight."""


def tensor_bytes(*values: Any) -> int:
    """Bytes of all dense tensors in nested arguments; a broadcast tensor counts what is stored."""
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors_in(values)
        if tensor.layout is torch.strided
    )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []
