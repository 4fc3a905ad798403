"""What this package's operators are in torch's own, for exported programs that run where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation_ops, fused_ops, ops

NOT_TRANSPOSED = (False, [0, 0, 0])


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What every operator of this package is in torch's operators, for `ExportedProgram.run_decompositions`.

    `torch.export.export` of a model with this package's convolutions keeps its operators, so that whoever runs the
    program with pyvolconv imported has its speed. With this table it becomes one that runs anywhere, for example after
    `torch.export.save` or `torch._inductor.aoti_compile_and_package`; other operators stay as they are.
    `torch.onnx.export` and `torch.jit.trace` of a model need no table.

    Returns:
        operator -> a function of the same arguments.

    Example:
        >>> import torch, pyvolconv
        >>> program = torch.export.export(pyvolconv.Conv3d(1, 2, 3), (torch.zeros(1, 1, 4, 4, 4),))
        >>> program = program.run_decompositions(pyvolconv.decompositions())
        >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        ['aten.convolution.default']
    """
    return {
        ops.conv3d: _conv3d,
        ops.conv3d_grad_input: _conv3d_grad_input,
        ops.conv3d_grad_weight: _conv3d_grad_weight,
        activation_ops.conv3d_activation: activation_ops.put_together_conv3d_activation,
        fused_ops.conv3d_max_pool: fused_ops.put_together_conv3d_max_pool,
        fused_ops.conv3d_max_pool_grad_input: fused_ops.put_together_grad_input,
        fused_ops.conv3d_max_pool_grad_weight: fused_ops.put_together_grad_weight,
    }


def _split_padding(padding: Sequence[int]) -> tuple[list[int], list[int]]:
    """(padding that both ends share, per axis; the rest as `F.pad` takes it)."""
    shared = [min(padding[axis : axis + 2]) for axis in (0, 2, 4)]
    return shared, [padding[2 * axis + end] - shared[axis] for axis in (2, 1, 0) for end in (0, 1)]


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    shared, excess = _split_padding(padding)
    x = F.pad(x, excess) if any(excess) else x
    return torch.convolution(x, weight, bias, stride, shared, dilation, *NOT_TRANSPOSED, groups)


def _conv3d_grad_input(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    # Without padding, and what the stride left over at the end of the input.
    reached = [
        (grad_output.shape[2 + axis] - 1) * stride[axis] + dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        for axis in range(3)
    ]
    begin = padding[::2]
    rest = [input_size[axis] + 2 * begin[axis] - reached[axis] for axis in range(3)]
    if all(0 <= rest[axis] < max(stride[axis], dilation[axis]) for axis in range(3)):
        # Any transposed convolution of torch's.
        return torch.convolution(grad_output, weight, None, stride, begin, dilation, True, rest, groups)
    shared, excess = _split_padding(padding)
    ends = [input_size[axis] + padding[2 * axis] + padding[2 * axis + 1] - reached[axis] for axis in range(3)]
    grad = torch.convolution(grad_output, weight, None, stride, shared, dilation, True, ends, groups)
    return F.pad(grad, [-voxels for voxels in excess])


def _conv3d_grad_weight(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    shared, excess = _split_padding(padding)
    x = F.pad(x, excess) if any(excess) else x
    # Only its sizes are read.
    weight = grad_output.new_empty([grad_output.shape[1], x.shape[1] // groups, *kernel_size])
    wanted = (False, True, False)
    _, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad_output, x, weight, None, stride, shared, dilation, *NOT_TRANSPOSED, groups, wanted
    )
    result: Tensor = grad_weight
    return result
