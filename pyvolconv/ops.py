"""The three passes of a convolution as torch operators.

    y  = conv3d(x, weight, bias, ...)
    dx = conv3d_grad_input(grad_output, weight, input_size, ...)
    dw = conv3d_grad_weight(grad_output, x, kernel_size, ...)

`padding` is (begin, end) per axis, six numbers: depth, height, width. An operator makes the operands dense
in one layout, asks the dispatcher for a backend and hands the call down; what autograd and the function
transforms do with the operators stands in `derivatives` and `transforms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backends.base import MEMORY_FORMAT, empty
from .dispatch import choose, run
from .problem import ConvProblem, Layout

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
library = torch.library.Library("pyvolconv", "DEF")
library.define(f"conv3d(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor")
library.define(f"conv3d_grad_input(Tensor grad_output, Tensor weight, SymInt[] input_size, {_GEOMETRY}) -> Tensor")
library.define(f"conv3d_grad_weight(Tensor grad_output, Tensor x, SymInt[] kernel_size, {_GEOMETRY}) -> Tensor")

conv3d = torch.ops.pyvolconv.conv3d.default
conv3d_grad_input = torch.ops.pyvolconv.conv3d_grad_input.default
conv3d_grad_weight = torch.ops.pyvolconv.conv3d_grad_weight.default

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""stride, padding, dilation, groups: what the three operators share."""


def layout_of(*tensors: Tensor) -> Layout:
    """ "ndhwc" when one of the tensors suggests channels_last_3d, by the rule that torch.conv3d follows."""
    return "ndhwc" if any(_suggests_channels_last(tensor) for tensor in tensors) else "ncdhw"


def _suggests_channels_last(tensor: Tensor) -> bool:
    # c10/core/MemoryFormat.h, is_channels_last_strides_3d: strides grow from channels outwards, and a
    # tensor for which both orders are true (one voxel, or one channel) counts as contiguous.
    shape, stride = tensor.shape, tensor.stride()
    if stride[1] == 0:
        return False
    least = 0
    for axis in (1, 4, 3, 2, 0):
        if shape[axis] == 0 or stride[axis] < least or (axis == 0 and least == stride[1]):
            return False
        least = stride[axis] * shape[axis] if shape[axis] > 1 else stride[axis]
    return True


@lru_cache(maxsize=4096)
def _problem(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: Layout,
    device: str,
    bias: bool,
) -> ConvProblem:
    return ConvProblem(
        batch=input_shape[0],
        in_channels=input_shape[1],
        out_channels=weight_shape[0],
        input_size=input_shape[2:],  # type: ignore[arg-type]
        kernel_size=weight_shape[2:],  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=(padding[0:2], padding[2:4], padding[4:6]),  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        device=device,
        bias=bias,
    )


def conv3d_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    geometry: Geometry,
    like: Tensor,
    layout: Layout,
    bias: bool = False,
) -> ConvProblem:
    """The problem of an operator call; shapes as torch writes them, dtype and device those of `like`."""
    stride, padding, dilation, groups = geometry
    return _problem(
        tuple(input_shape),
        tuple(weight_shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        like.dtype,
        layout,
        like.device.type,
        bias,
    )


def _grad_input_shapes(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], groups: int) -> list[int]:
    return [grad_output.shape[0], weight.shape[1] * groups, *input_size]


def _grad_weight_shapes(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], groups: int) -> list[int]:
    return [grad_output.shape[1], x.shape[1] // groups, *kernel_size]


def require(
    problem: ConvProblem, operand: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """That an operand fits to another: hooks of saved tensors may have made anything of it.

    Raises:
        RuntimeError: it has another shape, dtype (that of `like` unless one is given) or device.
    """
    dtype = dtype or like.dtype
    if operand.shape != shape or operand.dtype != dtype or operand.device != like.device:
        raise RuntimeError(
            f"{problem}: expected a tensor of {shape} in {dtype} on {like.device}, "
            f"got {tuple(operand.shape)} in {operand.dtype} on {operand.device}"
        )


def _run_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    layout = layout_of(x, weight)
    problem = conv3d_problem(x.shape, weight.shape, geometry, x, layout, bias is not None)
    require(problem, weight, problem.weight_shape, x)
    if bias is not None:
        require(problem, bias, (problem.out_channels,), x)
    if x.numel() == 0 or weight.numel() == 0:
        y = empty(problem, "output", like=x).zero_()
        return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))
    memory_format = MEMORY_FORMAT[layout]
    return run(
        choose(problem, "forward").forward,
        problem,
        "forward",
        x.contiguous(memory_format=memory_format),
        weight.contiguous(memory_format=memory_format),
        None if bias is None else bias.contiguous(),
    )


def _run_conv3d_grad_input(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    layout = layout_of(grad_output, weight)
    shape = _grad_input_shapes(grad_output, weight, input_size, geometry[3])
    problem = conv3d_problem(shape, weight.shape, geometry, grad_output, layout)
    require(problem, grad_output, problem.output_shape, weight)
    if grad_output.numel() == 0 or weight.numel() == 0:
        return empty(problem, "input", like=grad_output).zero_()
    memory_format = MEMORY_FORMAT[layout]
    return run(
        choose(problem, "grad_input").grad_input,
        problem,
        "grad_input",
        grad_output.contiguous(memory_format=memory_format),
        weight.contiguous(memory_format=memory_format),
    )


def _run_conv3d_grad_weight(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    layout = layout_of(grad_output, x)
    shape = _grad_weight_shapes(grad_output, x, kernel_size, geometry[3])
    problem = conv3d_problem(x.shape, shape, geometry, grad_output, layout)
    require(problem, grad_output, problem.output_shape, x)
    if grad_output.numel() == 0 or x.numel() == 0:
        return empty(problem, "weight", like=grad_output).zero_()
    memory_format = MEMORY_FORMAT[layout]
    return run(
        choose(problem, "grad_weight").grad_weight,
        problem,
        "grad_weight",
        grad_output.contiguous(memory_format=memory_format),
        x.contiguous(memory_format=memory_format),
    )


def grad_bias(grad: Tensor) -> Tensor:
    """dL/dbias of a convolution with dL/dy."""
    # Sample by sample: in channels_last_3d three times as fast as one sum over four axes, in any layout as exact.
    return grad.sum((2, 3, 4)).sum(0)


def kernel_of(operator: Any) -> Callable[..., Tensor]:
    """The function that computes one of the three operators, without the dispatcher's way to it."""
    return _KERNELS[operator]


def fake_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """A tensor with the shape and strides of the operator's result; of symbolic sizes too."""
    stride, padding, dilation, _ = geometry
    size = [
        (
            x.shape[2 + axis]
            + padding[2 * axis]
            + padding[2 * axis + 1]
            - dilation[axis] * (weight.shape[2 + axis] - 1)
            - 1
        )
        // stride[axis]
        + 1
        for axis in range(3)
    ]
    return x.new_empty([x.shape[0], weight.shape[0], *size]).to(memory_format=MEMORY_FORMAT[layout_of(x, weight)])


def _fake_conv3d_grad_input(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    shape = _grad_input_shapes(grad_output, weight, input_size, geometry[3])
    return grad_output.new_empty(shape).to(memory_format=MEMORY_FORMAT[layout_of(grad_output, weight)])


def _fake_conv3d_grad_weight(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    shape = _grad_weight_shapes(grad_output, x, kernel_size, geometry[3])
    return grad_output.new_empty(shape).to(memory_format=MEMORY_FORMAT[layout_of(grad_output, x)])


_KERNELS: dict[Any, Callable[..., Tensor]] = {
    conv3d: _run_conv3d,
    conv3d_grad_input: _run_conv3d_grad_input,
    conv3d_grad_weight: _run_conv3d_grad_weight,
}
for _operator, _fake in (
    (conv3d, fake_conv3d),
    (conv3d_grad_input, _fake_conv3d_grad_input),
    (conv3d_grad_weight, _fake_conv3d_grad_weight),
):
    library.impl(_operator, _KERNELS[_operator], "CompositeExplicitAutograd")
    torch.library.register_fake(_operator, _fake, lib=library)
