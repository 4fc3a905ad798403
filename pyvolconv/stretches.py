"""Stretches of convolutions, each with an InstanceNorm3d chain behind it, that run in channels_last_3d inside.

Kernels are faster with channels innermost, and what is between the modules of a stretch nobody sees. Its result is what
torch's InstanceNorm3d returns for any layout, contiguous: the last norm writes it so. Backends that can read contiguous
operands do (`Backend.mixes_layouts`); where one cannot, or gradients will be asked for, whose passes want channels
innermost again, they are copied, the weights too, at every call, so that nothing is ever out of date. Modules that
stand in several places of a model may be in a stretch: they are called with their own parameters, as anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .arguments import conv3d_arguments
from .dispatch import choose, run
from .functional import conv3d
from .instance_norm import is_compiled
from .layouts import in_layout
from .links import chain_length, link_of, obstacle, watched
from .norm_chains import run_norm_chain
from .ops import conv3d_problem, layout_of
from .ordinary import is_ordinary
from .shortcut import is_differentiated

FEWEST_VALUES = 1 << 18
"""Of all operands and results of the convolutions of a stretch."""


def stretch_end(modules: Sequence[nn.Module], start: int, x: Tensor) -> int:
    """The index behind the stretch that starts at a module; `start` where there is none, or it would save nothing.

    Args:
        modules: in the order in which they are called.
        start: index of the first.
        x: what the first is called on.
    """
    if torch.compiler.is_compiling() or link_of(modules[start]) != "convolution" or not is_compiled():
        return start
    if x.dim() != 5 or x.dtype != torch.float32 or not x.is_cpu:
        return start
    position, values, parameters = start, 0, 0
    size = list(x.shape[2:])
    while position + 1 < len(modules) and _is_link(modules, position):
        convolution, norm = modules[position], modules[position + 1]
        assert isinstance(convolution, nn.Conv3d)
        weight = convolution.weight
        if norm.num_features != weight.shape[0] or not is_ordinary(x, weight, convolution.bias, under_profiler=True):
            break
        values += weight.shape[1] * size[0] * size[1] * size[2]
        size = [-(-extent // step) for extent, step in zip(size, convolution.stride, strict=True)]
        values += weight.shape[0] * size[0] * size[1] * size[2]
        parameters += weight.numel()
        position += 1 + chain_length(modules, position + 1)
    if position == start:
        return start
    # Else copying weights, or calling anything, takes longer than what the layout saves.
    is_large = x.shape[0] * values >= max(parameters, FEWEST_VALUES)
    return position if is_large and not _comes_as_it_leaves(x, modules, start) else start


def _is_link(modules: Sequence[nn.Module], position: int) -> bool:
    """Whether a convolution and an InstanceNorm3d are next."""
    convolution, norm = modules[position], modules[position + 1]
    if link_of(convolution) != "convolution" or link_of(norm) != "instance normalization":
        return False
    if obstacle(convolution) or obstacle(norm):
        return False
    return isinstance(convolution, nn.Conv3d) and convolution.groups == 1 and convolution.weight.dtype == torch.float32


def _comes_as_it_leaves(x: Tensor, modules: Sequence[nn.Module], start: int) -> bool:
    """Whether the modules keep channels_last_3d by themselves."""
    convolution, norm = modules[start], modules[start + 1]
    assert isinstance(convolution, nn.Conv3d)
    return getattr(norm, "keeps_channels_last", False) and layout_of(x, convolution.weight) == "ndhwc"


def run_stretch(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What calling the modules of a stretch one after the other returns."""
    position = 0
    while position < len(modules):
        convolution = modules[position]
        assert isinstance(convolution, nn.Conv3d)
        with watched(convolution, x) as result:
            y = _convolve(convolution, x)
            result.append(y)
        length = chain_length(modules, position + 1)
        chain = modules[position + 1 : position + 1 + length]
        position += 1 + length
        with watched(chain[0], y) as result:
            x = run_norm_chain(chain, y, keep_channels_last=position < len(modules))
            result.append(x)
    return x.contiguous()


def _convolve(convolution: nn.Conv3d, x: Tensor) -> Tensor:
    """The result of a convolution in channels_last_3d, whatever the layout of its operands."""
    weight, bias = convolution.weight, convolution.bias
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    args = None
    if not is_differentiated(x, weight, bias) and _is_dense(x) and _is_dense(weight):
        args = conv3d_arguments(x, weight, bias, *geometry)
    if args is not None and (bias is None or bias.is_contiguous()):
        problem = conv3d_problem(x.shape, weight.shape, args, x, "ndhwc", bias is not None)
        backend = choose(problem, "forward")
        if "weight" in backend.mixes_layouts:
            x = x if "x" in backend.mixes_layouts else in_layout(x, "ndhwc")
            return run(backend.forward, problem, "forward", x, weight, bias)
    # One channel has no order, and the weight says which layout is meant; but a gradient comes in its own.
    x = in_layout(x, "ndhwc") if x.shape[1] > 1 or x.requires_grad else x
    return conv3d(x, in_layout(weight, "ndhwc"), bias, *geometry)


def _is_dense(operand: Tensor) -> bool:
    return operand.is_contiguous() or operand.is_contiguous(memory_format=torch.channels_last_3d)
