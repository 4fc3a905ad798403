"""An operator call, assigned: to a layer, a kind and passes, with its work. Counting and profiling share this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attribution import Attribution, Phase
from .operators import operator_cost
from .work import Work


@dataclass(frozen=True)
class Assignment:
    """Where one operator call belongs.

    Attributes:
        layer: see `attribution.Place.layer`; of a recurrent module each layer and direction, "lstm.l1_reverse".
        phase: of the step.
        kind: see `counting.LayerCost.kind`.
        operator: e.g. "aten.convolution".
        works: (pass, work) of the call; several where one operator does several passes.
        exact: whether the work is counted by a formula for this operator.
    """

    layer: str
    phase: Phase
    kind: str
    operator: str
    works: tuple[tuple[str, Work], ...]
    exact: bool


class Assigner:
    """Assigns the operator calls of one model's steps, in the order of running.

    The sum over a gradient that gives the bias of a convolution or a linear layer counts as that layer's grad_weight,
    because aten.convolution_backward does both in one call.
    """

    def __init__(self, attribution: Attribution) -> None:
        self._attribution = attribution
        self._kind_with_weight: dict[str, str] = {}

    def assign(self, operator: torch._ops.OpOverload, args: Sequence[Any], result: Any) -> Assignment:
        """Assign a call; to be asked while the operator's graph node is still current."""
        place = self._attribution.place()
        cost = operator_cost(operator, args, result, self._attribution.is_weight)
        layer = self._attribution.sublayer(place.layer, cost.kind, args)
        name = str(operator.overloadpacket)
        kind = cost.kind
        if place.phase == "update":
            kind = "optimizer"
        elif place.phase == "forward" and kind in ("conv", "linear"):
            self._kind_with_weight[layer] = kind
        default: str = place.phase
        if place.phase == "backward":
            if name == "aten.sum" and layer in self._kind_with_weight and _is_sum_over_channels(args, result):
                kind, default = self._kind_with_weight[layer], "grad_weight"
            elif kind == "linear":
                default = "grad_input" if any(work.weights for work in cost.works) else "grad_weight"
        works = tuple((work.pass_ or default, work) for work in cost.works)
        return Assignment(layer, place.phase, kind, name, works, cost.exact)


def _is_sum_over_channels(args: Sequence[Any], result: Any) -> bool:
    return bool(args[0].dim() > 1 and result.numel() == args[0].shape[1])
