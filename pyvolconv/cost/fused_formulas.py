"""Formulas for convolution, activation and max-pool as one operator, and for its sparse gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..fused_ops import fused_problem, split_sizes
from ..ops import conv3d_problem, layout_of
from .work import Formula, IsWeight, OperatorCost, Work


def _forward(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    x, weight, bias, *sizes = args
    geometry, pool = split_sizes(sizes)
    plain = conv3d_problem(x.shape, weight.shape, geometry, x, layout_of(x, weight), bias is not None)  # type: ignore[arg-type]
    problem = fused_problem(plain, pool, *sizes[4:6])
    multiply_adds = plain.flops("grad_weight") // 2
    work = Work("forward", problem.flops("forward"), problem.min_bytes("forward"), problem, (weight,), multiply_adds)
    return OperatorCost("conv", (work,))


def _grad_input(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    grad, code, weight, _, *sizes = args
    geometry, pool = split_sizes(sizes)
    layout = layout_of(grad, code, weight)
    plain = conv3d_problem(result.shape, weight.shape, geometry, grad, layout)  # type: ignore[arg-type]
    problem = fused_problem(plain, pool)
    work = Work(
        "grad_input",
        problem.flops("grad_input"),
        problem.min_bytes("grad_input"),
        problem,
        (weight,),
        problem.flops("grad_input") // 2,
    )
    return OperatorCost("conv", (work,))


def _grad_weight(args: Sequence[Any], result: tuple[Tensor, Tensor], is_weight: IsWeight) -> OperatorCost:
    grad, code, x, _, bias, *sizes = args
    geometry, pool = split_sizes(sizes)
    layout = layout_of(grad, code, x)
    plain = conv3d_problem(x.shape, result[0].shape, geometry, grad, layout, bias)  # type: ignore[arg-type]
    problem = fused_problem(plain, pool)
    work = Work("grad_weight", problem.flops("grad_weight"), problem.min_bytes("grad_weight"), problem)
    return OperatorCost("conv", (work,))


FUSED_FORMULAS: dict[str, Formula] = {
    "pyvolconv::conv3d_max_pool": _forward,
    "pyvolconv::conv3d_max_pool_grad_input": _grad_input,
    "pyvolconv::conv3d_max_pool_grad_weight": _grad_weight,
}
