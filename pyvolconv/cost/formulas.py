"""Formulas for the operators that do the work of a convolutional network: convolution, matrix product, pooling.

Convolutions are counted by `ConvProblem`: torch.utils.flop_counter charges a grouped convolution's backward pass
`groups` times too much, and knows no operator of this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..ops import conv3d_problem, layout_of
from ..problem import ConvProblem, Pass, Size3
from .fused_formulas import FUSED_FORMULAS
from .recurrent import RECURRENT_FORMULAS
from .work import Formula, IsWeight, OperatorCost, Work, tensor_bytes


def aten_problem(x: Tensor, weight: Tensor, bias: bool, geometry: Sequence[Any]) -> ConvProblem:
    """The problem of an ATen convolution of one to three spatial axes, the missing ones of size 1.

    A transposed convolution is the grad_input of the problem returned.

    Args:
        x, weight: the operands.
        bias: whether a bias is added.
        geometry: stride, padding, dilation, transposed, output_padding, groups.
    """
    stride, padding, dilation, transposed, output_padding, groups = geometry
    axes = x.dim() - 2

    def triple(values: Sequence[int], missing: int) -> Size3:
        values = list(values) * (axes if len(values) == 1 else 1)
        depth, height, width = [missing] * (3 - axes) + values
        return depth, height, width

    stride, padding, dilation = triple(stride, 1), triple(padding, 0), triple(dilation, 1)
    size, kernel, extra = triple(x.shape[2:], 1), triple(weight.shape[2:], 1), triple(output_padding, 0)
    channels = x.shape[1]
    if transposed:
        channels = weight.shape[1] * groups
        depth, height, width = (
            (size[axis] - 1) * stride[axis] - 2 * padding[axis] + dilation[axis] * (kernel[axis] - 1) + extra[axis] + 1
            for axis in range(3)
        )
        size = depth, height, width
    return conv3d_problem(
        (x.shape[0], channels, *size),
        (*weight.shape[:2], *kernel),
        (stride, [pad for pad in padding for _ in range(2)], dilation, groups),
        x,
        layout_of(x, weight) if axes == 3 else "ncdhw",
        bias and not transposed,
    )


def _convolution(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    x, weight, bias = args[:3]
    problem = aten_problem(x, weight, bias is not None, args[3:9])
    transposed = args[6]
    pass_: Pass = "grad_input" if transposed else "forward"
    # The problem of a transposed convolution is that of another one and does not know of this bias.
    apart = transposed and bias is not None
    flops = problem.flops(pass_) + (result.numel() if apart else 0)
    size = problem.min_bytes(pass_) + (tensor_bytes(bias) if apart else 0)
    return _conv(Work("forward", flops, size, problem, (weight,), problem.flops("grad_weight") // 2))


def _convolution_backward(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    grad_output, x, weight = args[:3]
    problem = aten_problem(x, weight, False, args[4:10])
    needs_input, needs_weight, needs_bias = args[10]
    works = []
    if needs_input:
        pass_: Pass = "forward" if args[7] else "grad_input"
        works.append(Work("grad_input", problem.flops(pass_), problem.min_bytes(pass_), problem))
    if needs_weight or needs_bias:
        flops = problem.flops("grad_weight") if needs_weight else 0
        size = problem.min_bytes("grad_weight") if needs_weight else tensor_bytes(grad_output)
        if needs_bias:
            flops += grad_output.numel()
            size += grad_output.shape[1] * grad_output.element_size()
        works.append(Work("grad_weight", flops, size, problem))
    return _conv(*works)


def _conv3d(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    x, weight, bias, *geometry = args
    layout = layout_of(x, weight)
    problem = conv3d_problem(x.shape, weight.shape, tuple(geometry), x, layout, bias is not None)
    return _conv(_whole("forward", problem, weight))


def _conv3d_activation(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    x, weight, bias, residual, *geometry = args[:8]
    (work,) = _conv3d((x, weight, bias, *geometry), result, is_weight).works
    if residual is None:
        return _conv(work)
    return _conv(replace(work, flops=work.flops + result.numel(), min_bytes=work.min_bytes + tensor_bytes(residual)))


def _conv3d_grad_input(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    grad_output, weight, _, *geometry = args
    layout = layout_of(grad_output, weight)
    problem = conv3d_problem(result.shape, weight.shape, tuple(geometry), grad_output, layout)
    return _conv(_whole("grad_input", problem, weight))


def _conv3d_grad_weight(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    grad_output, x, _, *geometry = args
    problem = conv3d_problem(x.shape, result.shape, tuple(geometry), grad_output, layout_of(grad_output, x))
    return _conv(_whole("grad_weight", problem, None))


def _whole(pass_: Pass, problem: ConvProblem, weight: Tensor | None) -> Work:
    multiply_adds = problem.flops("grad_weight") // 2 if weight is not None else 0
    weights = (weight,) if weight is not None else ()
    return Work(pass_, problem.flops(pass_), problem.min_bytes(pass_), problem, weights, multiply_adds)


def _conv(*works: Work) -> OperatorCost:
    return OperatorCost("conv", works)


def _product(first: int) -> Formula:
    """(..., n, k) @ (..., k, m) with operands at `args[first]` and `args[first + 1]`; first = 1 adds `args[0]`."""

    def formula(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
        left, right = args[first : first + 2]
        multiply_adds = result.numel() * left.shape[-1]
        weights = tuple(operand for operand in (left, right) if is_weight(operand))
        added = result.numel() if first else 0
        size = tensor_bytes(list(args[: first + 2]), result)
        work = Work(None, 2 * multiply_adds + added, size, None, weights, multiply_adds if weights else 0)
        return OperatorCost("linear", (work,))

    return formula


def _max_pool_forward(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    x, (values, indices) = args[0], result
    dilation = list(args[4]) if len(args) > 4 else [1]
    flops = _taps(x, values, dilation, args[1:4])
    return OperatorCost("pool", (Work(None, flops, tensor_bytes(x, values, indices)),))


def _max_pool_backward(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    grad_output, indices = args[0], args[-1]
    return OperatorCost("pool", (Work(None, grad_output.numel(), tensor_bytes(grad_output, indices, result)),))


def _avg_pool_forward(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    flops = _taps(args[0], result, [1], args[1:4]) + result.numel()
    return OperatorCost("pool", (Work(None, flops, tensor_bytes(args[0], result)),))


def _avg_pool_backward(args: Sequence[Any], result: Tensor, is_weight: IsWeight) -> OperatorCost:
    flops = _taps(result, args[0], [1], args[2:5]) + args[0].numel()
    return OperatorCost("pool", (Work(None, flops, tensor_bytes(args[0], result)),))


def _taps(x: Tensor, pooled: Tensor, dilation: Sequence[int], geometry: Sequence[Any]) -> int:
    """Input values in all windows together, those that padding or ceil_mode cuts off not counted.

    `geometry` is kernel_size, stride (none: kernel_size) and padding (none: 0), the last two optional.
    """
    kernel = list(geometry[0])
    stride = list(geometry[1]) if len(geometry) > 1 and geometry[1] else kernel
    padding = list(geometry[2]) if len(geometry) > 2 else [0]
    axes = pooled.dim() - 2
    kernel, stride, padding, dilation = (
        list(values) * (axes if len(values) == 1 else 1) for values in (kernel, stride, padding, dilation)
    )
    reached = [
        sum(
            0 <= window * stride[axis] - padding[axis] + tap * dilation[axis] < x.shape[2 + axis]
            for window in range(pooled.shape[2 + axis])
            for tap in range(kernel[axis])
        )
        for axis in range(axes)
    ]
    return math.prod((*reached, *pooled.shape[:2]))


FORMULAS: dict[str, Formula] = {
    **RECURRENT_FORMULAS,
    **FUSED_FORMULAS,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "pyvolconv::conv3d": _conv3d,
    "pyvolconv::conv3d_activation": _conv3d_activation,
    "pyvolconv::conv3d_grad_input": _conv3d_grad_input,
    "pyvolconv::conv3d_grad_weight": _conv3d_grad_weight,
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::addmm": _product(1),
    "aten::baddbmm": _product(1),
    "aten::max_pool2d_with_indices": _max_pool_forward,
    "aten::max_pool3d_with_indices": _max_pool_forward,
    "aten::max_pool2d_with_indices_backward": _max_pool_backward,
    "aten::max_pool3d_with_indices_backward": _max_pool_backward,
    "aten::avg_pool2d": _avg_pool_forward,
    "aten::avg_pool3d": _avg_pool_forward,
    "aten::avg_pool2d_backward": _avg_pool_backward,
    "aten::avg_pool3d_backward": _avg_pool_backward,
}
"""Operators with a formula of their own, by "namespace::name"."""
