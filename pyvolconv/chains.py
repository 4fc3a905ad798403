"""Chains of modules that run as one pass: Conv3d, BatchNorm3d in eval mode, an activation, MaxPool3d; and others.

Modules are given in the order in which they are called, each fed with what the one before returned and nothing else. A
chain starts at a convolution and goes on as long as the next module is the next link and nothing forbids it. It runs as

    with a pool      conv3d_max_pool, the activation inside
    without          on CUDA conv3d_activation; on the CPU, where it saves no pass, conv3d, then ReLU in place (the
                     convolution's result is nobody else's), or LeakyReLU where no gradient is kept or the module is
                     `inplace`, or any other activation as it is

Another kind starts at an InstanceNorm3d without running statistics, or a BatchNorm3d in training mode, and ends at a
ReLU, LeakyReLU or PReLU, with dropout that drops nothing between them (`norm_chains`). Convolutions with chains of
InstanceNorm3d behind them run in channels_last_3d (`stretches`).

A BatchNorm3d in eval mode is an affine map per channel, folded into the convolution's weight and bias at every call:
both are small, gradients reach every parameter, and nothing can be out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation_functional import conv3d_activation
from .epilogue import NEGATIVE_SLOPE
from .functional import conv3d
from .fused_functional import conv3d_max_pool
from .links import activation_name, chain_length, link_of, original_class, watched
from .norm_chains import run_norm_chain
from .stretches import run_stretch, stretch_end


def run(modules: Sequence[nn.Module], x: Any, leave: Callable[[int], bool] = lambda index: False) -> Any:
    """What calling `modules` one after the other on `x` returns, chains among them in one pass."""
    position = 0
    while position < len(modules):
        if isinstance(x, Tensor) and (end := stretch_end(modules, position, x)) > position:
            x = run_stretch(modules[position:end], x)
            position = end
            continue
        length = chain_length(modules, position, leave) if isinstance(x, Tensor) else 1
        x = modules[position](x) if length == 1 else _run_watched(modules[position : position + length], x)
        position += length
    return x


def _run_watched(chain: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Hooks that say of themselves that they watch only (the profiler's) see the chain as its first module."""
    first = chain[0]
    with watched(first, x) as result:
        y = _run_chain(chain, x) if isinstance(first, nn.Conv3d) else run_norm_chain(chain, x)
        result.append(y)
    return y


def _run_chain(chain: Sequence[nn.Module], x: Tensor) -> Tensor:
    convolution, *links = chain
    assert isinstance(convolution, nn.Conv3d)
    weight, bias = convolution.weight, convolution.bias
    if isinstance(norm := links[0], nn.BatchNorm3d):
        assert norm.running_var is not None
        if x.dim() != 5 or norm.running_var.dtype != weight.dtype or norm.running_var.shape != weight.shape[:1]:
            # BatchNorm3d refuses one sample without a batch, and another number of channels, and computes in a dtype
            # of its own; folded it would not.
            for module in chain:
                x = module(x)
            return x
        weight, bias = _fold(weight, bias, norm)
        del links[0]
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    activation: nn.Module | None = links[0] if links and link_of(links[0]) == "activation" else None
    name = activation_name(activation)
    slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else NEGATIVE_SLOPE
    pool = links[-1] if links else None
    if isinstance(pool, nn.MaxPool3d):
        return conv3d_max_pool(
            x,
            weight,
            bias,
            *geometry,
            activation=name,
            negative_slope=slope,
            pool_size=pool.kernel_size,
            pool_stride=pool.stride,
            pool_padding=pool.padding,
            ceil_mode=pool.ceil_mode,
        )
    if activation is not None and has_activation_in_the_pass(x):
        return conv3d_activation(x, weight, bias, *geometry, activation=name, negative_slope=slope)
    y = conv3d(x, weight, bias, *geometry)
    # Who watches operators may have kept y, as selective checkpointing does.
    unseen = torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()
    if isinstance(activation, nn.ReLU):
        return F.relu(y, inplace=activation.inplace or unseen)
    if isinstance(activation, nn.LeakyReLU):
        # In place its backward needs the result, which then nobody may change; else what it was applied to.
        in_place = activation.inplace or (unseen and not y.requires_grad)
        return F.leaky_relu(y, activation.negative_slope, inplace=in_place)
    if isinstance(activation, nn.GELU):
        return F.gelu(y, approximate=activation.approximate)
    return y if activation is None else F.silu(y)


def has_activation_in_the_pass(x: Tensor) -> bool:
    """Whether `conv3d_activation` saves a pass over memory."""
    return x.is_cuda


def _fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution followed by norm(y) = (y - mean) / sqrt(var + eps) * gamma + beta."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = norm.running_mean if bias is None else norm.running_mean - bias
    bias = -shift * scale if norm.bias is None else norm.bias - shift * scale
    return weight * scale.view(-1, 1, 1, 1, 1), bias


def describe(chain: Sequence[nn.Module]) -> str:
    """A chain in one line, for the report."""
    links = " + ".join(original_class(module).__name__ for module in chain)
    first, last = chain[0], chain[-1]
    if not isinstance(first, nn.Conv3d) or link_of(last) == "pool":
        return f"{links} in one pass"
    if link_of(last) == "activation" and has_activation_in_the_pass(first.weight):
        return f"{links} in one pass"
    if isinstance(last, nn.LeakyReLU) and not last.inplace:
        return f"{links}, in place without gradients"
    return f"{links}, in place" if isinstance(last, (nn.ReLU, nn.LeakyReLU)) else f"{links}, folded"
