"""`conv3d` and `conv_transpose3d` with the signatures, results and errors of `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

# Derivatives and transforms register with the operators; no call may come past this file without them.
from . import derivatives as derivatives
from . import ops
from . import transforms as transforms
from .arguments import Padding, Sizes, conv3d_arguments, conv_transpose3d_sizes, padding_of_pairs
from .autocast import is_hidden_by_vmap, outside_autocast
from .dispatch import logger
from .elsewhere import is_recorded_for_elsewhere, script_call_as
from .shortcut import call_of, transposed_call_of


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """3-D convolution (cross-correlation), as `torch.nn.functional.conv3d`.

    Args:
        input: (N, C_in, D, H, W), or (C_in, D, H, W) for one sample; any strides.
        weight: (C_out, C_in / groups, K_d, K_h, K_w).
        bias: (C_out,) or None.
        stride, dilation: one number or one per axis (depth, height, width).
        padding: likewise, or "valid", or "same" (stride 1; an even kernel pads one more at the end); or, beyond torch,
            ((begin, end), (begin, end), (begin, end)): a causal kernel of three frames has ((2, 0), (1, 1), (1, 1)).
        groups: number of independent channel groups.

    Returns:
        (N, C_out, D_out, H_out, W_out), in channels_last_3d when `input` or `weight` is.

    Raises:
        RuntimeError, TypeError, ValueError: those of `torch.nn.functional.conv3d`, in its wording.
        UnsupportedProblemError: a forced backend cannot run the problem.

    Example:
        >>> import torch, pyvolconv
        >>> x, w = torch.randn(2, 3, 8, 8, 8), torch.randn(4, 3, 3, 3, 3)
        >>> pyvolconv.conv3d(x, w, padding="same").shape
        torch.Size([2, 4, 8, 8, 8])
    """
    if has_torch_function_variadic(input, weight, bias):
        operands = (input, weight, bias)
        return handle_torch_function(conv3d, operands, *operands, stride, padding, dilation, groups)
    call = call_of(input, weight, bias, stride, padding, dilation, groups)
    if call is not None:
        return call(input, weight, bias)
    if is_recorded_for_elsewhere():
        return _torch_conv3d(input, weight, bias, stride, padding, dilation, groups)
    if is_hidden_by_vmap():
        with outside_autocast():
            return conv3d(input, weight, bias, stride, padding, dilation, groups)
    args = conv3d_arguments(input, weight, bias, stride, padding, dilation, groups)
    if args is None:
        return _leave_to_torch(_torch_conv3d, input, weight, bias, stride, padding, dilation, groups)
    batched = input if input.dim() == 5 else input.unsqueeze(0)
    y: Tensor = ops.conv3d(batched, weight, bias, *args)
    return y if input.dim() == 5 else y.squeeze(0)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """Transposed 3-D convolution, as `torch.nn.functional.conv_transpose3d`.

    It is the gradient with respect to the input of the convolution that maps this result's size back to
    this input's size, and is computed as such.

    Args:
        input: (N, C_in, D, H, W), or (C_in, D, H, W) for one sample; any strides.
        weight: (C_in, C_out / groups, K_d, K_h, K_w).
        bias: (C_out,) or None.
        stride, padding, dilation: one number or one per axis, of that convolution.
        output_padding: voxels added at the end of each axis of the result.
        groups: number of independent channel groups.

    Returns:
        (N, C_out, D_out, H_out, W_out), in channels_last_3d when `input` or `weight` is; per axis
        (D - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1.

    Raises:
        RuntimeError, TypeError, ValueError: those of `torch.nn.functional.conv_transpose3d`.
        UnsupportedProblemError: a forced backend cannot run the problem.

    Example:
        >>> import torch, pyvolconv
        >>> x, w = torch.randn(2, 4, 5, 5, 5), torch.randn(4, 3, 2, 2, 2)
        >>> pyvolconv.conv_transpose3d(x, w, stride=2).shape
        torch.Size([2, 3, 10, 10, 10])
    """
    if has_torch_function_variadic(input, weight, bias):
        operands = (input, weight, bias)
        return handle_torch_function(
            conv_transpose3d, operands, *operands, stride, padding, output_padding, groups, dilation
        )
    call = transposed_call_of(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if call is not None:
        return call(input, weight, bias)
    if is_recorded_for_elsewhere():
        return F.conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if is_hidden_by_vmap():
        with outside_autocast():
            return conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    sizes = conv_transpose3d_sizes(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if sizes is None:
        return _leave_to_torch(
            F.conv_transpose3d, input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    result_size, args, missing = sizes
    batched = input if input.dim() == 5 else input.unsqueeze(0)
    y: Tensor = ops.conv3d_grad_input(batched, weight, result_size, *args)
    if any(missing):
        y = F.pad(y, missing)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1, 1)
    return y if input.dim() == 5 else y.squeeze(0)


def _torch_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any) -> Tensor:
    """torch's convolution, which takes no pairs of paddings."""
    pairs = padding_of_pairs(padding)
    if pairs is not None and isinstance(input, Tensor):
        input, padding = F.pad(input, [*pairs[4:], *pairs[2:4], *pairs[:2]]), 0
    return F.conv3d(input, weight, bias, stride, padding, *rest)


def _leave_to_torch(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """torch's answer to arguments that make no convolution of ours, most often an error, which it words."""
    y = function(*args)
    if not torch.compiler.is_compiling():
        _log_once(f"a call with result {tuple(y.shape)} of {y.dtype} runs in torch: no backend takes such arguments")
    return y


@lru_cache(maxsize=4096)
def _log_once(message: str) -> None:
    logger.warning(message)


script_call_as(conv3d, "aten::conv3d")
script_call_as(conv_transpose3d, "aten::conv_transpose3d")
