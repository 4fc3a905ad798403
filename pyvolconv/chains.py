"""Chains of modules that run as one pass: Conv3d, BatchNorm3d in eval mode, an activation, MaxPool3d; and others.

Modules are given in the order in which they are called, each fed with what the one before returned and nothing else. A
chain starts at a convolution and goes on as long as the next module is the next link and nothing forbids it. It runs as

    with a pool      conv3d_max_pool, the activation inside
    without          on CUDA conv3d_activation; on the CPU, where it saves no pass, conv3d, then ReLU in place (the
                     convolution's result is nobody else's), or LeakyReLU where no gradient is kept or the module is
                     `inplace`, or any other activation as it is

Another kind starts at an InstanceNorm3d without running statistics and ends at a ReLU, LeakyReLU or PReLU, with dropout
that drops nothing between them; it runs as `instance_norm_activation` where that takes the call, else module by module.

A BatchNorm3d in eval mode is an affine map per channel, folded into the convolution's weight and bias at every call:
both are small, gradients reach every parameter, and nothing can be out of date. Everything that may change between
calls (hooks, training mode, replaced modules) is looked at in every call, so a module is never skipped that would have
done anything else than its torch class says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .activation_functional import conv3d_activation
from .arguments import triple
from .elsewhere import is_recorded_for_elsewhere
from .epilogue import LARGEST_WINDOW, NEGATIVE_SLOPE, Activation, Size3
from .functional import conv3d
from .fused_functional import conv3d_max_pool
from .instance_norm import instance_norm_activation
from .nn import Conv3d, InstanceNorm3d

Link = Literal["convolution", "normalization", "activation", "pool", "instance normalization", "PReLU", "dropout"]

_LINKS: dict[type[nn.Module], Link] = {
    Conv3d: "convolution",
    nn.Conv3d: "convolution",
    nn.BatchNorm3d: "normalization",
    nn.ReLU: "activation",
    nn.LeakyReLU: "activation",
    nn.SiLU: "activation",
    nn.GELU: "activation",
    nn.MaxPool3d: "pool",
    InstanceNorm3d: "instance normalization",
    nn.InstanceNorm3d: "instance normalization",
    nn.PReLU: "PReLU",
    nn.Dropout: "dropout",
    nn.Dropout3d: "dropout",
}
CONVOLUTION_CHAIN: tuple[Link, ...] = ("convolution", "normalization", "activation", "pool")


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has when `accelerate` is undone."""
    original: type[nn.Module] = vars(type(module)).get("_pyvolconv_original", type(module))
    return original


def link_of(module: nn.Module) -> Link | None:
    """Which link of a chain a module could be; None for any other module."""
    link = _LINKS.get(original_class(module))
    return link or next((link for torch_class, link in _LINKS.items() if isinstance(module, torch_class)), None)


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether calling the module is calling its children in order, and nothing more."""
    original = original_class(module)
    return (
        isinstance(module, nn.Sequential)
        and original.forward is nn.Sequential.forward
        and original.__call__ is nn.Module.__call__
        and original.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]
        and not _interference(module)
    )


def flatten(sequential: nn.Sequential, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what a plain Sequential calls, in order, plain Sequentials inside it opened up."""
    for name, module in sequential._modules.items():
        if isinstance(module, nn.Sequential) and is_plain_sequential(module):
            yield from flatten(module, f"{path}{name}.")
        elif module is not None:
            yield f"{path}{name}", module


def obstacle(module: nn.Module, in_any_mode: bool = False) -> str:
    """Why a link must be called as it is, in words; empty when nothing forbids its fusion.

    Args:
        module: one for which `link_of` names a link.
        in_any_mode: leave out what `train()` and `eval()` change.
    """
    original = original_class(module)
    if original not in _LINKS:
        base = next(torch_class for torch_class in _LINKS if isinstance(module, torch_class))
        return f"{original.__name__} is a subclass of {base.__name__}"
    interference = _interference(module)
    if interference:
        return f"{original.__name__} has {interference}"
    if isinstance(module, nn.Conv3d) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if isinstance(module, nn.BatchNorm3d):
        return _obstacle_of_norm(module, in_any_mode)
    if isinstance(module, nn.InstanceNorm3d) and (module.running_mean is not None or module.running_var is not None):
        return "InstanceNorm3d keeps running statistics"
    if isinstance(module, (nn.Dropout, nn.Dropout3d)):
        drops = module.training and not in_any_mode and module.p != 0
        return f"{original.__name__} is in training mode" if drops or not 0 <= module.p <= 1 else ""
    if isinstance(module, nn.LeakyReLU) and not 0 <= module.negative_slope < math.inf:
        return f"LeakyReLU has negative_slope={module.negative_slope}"
    return _obstacle_of_pool(module) if isinstance(module, nn.MaxPool3d) else ""


def _obstacle_of_norm(module: nn.BatchNorm3d, in_any_mode: bool) -> str:
    if module.running_mean is None or module.running_var is None:
        return "BatchNorm3d keeps no running statistics"
    if module.training and not in_any_mode:
        return "BatchNorm3d is in training mode"
    return ""


def _obstacle_of_pool(module: nn.MaxPool3d) -> str:
    if module.return_indices:
        return "MaxPool3d has return_indices=True"
    sizes = [triple(size) for size in (module.kernel_size, module.stride, module.padding, module.dilation)]
    if None in sizes:
        return "MaxPool3d has sizes that torch refuses"
    window, stride, padding, dilation = cast("list[Size3]", sizes)
    if dilation != (1, 1, 1):
        return f"MaxPool3d has dilation={module.dilation}"
    if math.prod(window) > LARGEST_WINDOW:
        return f"MaxPool3d has a window of more than {LARGEST_WINDOW} voxels"
    if min(*window, *stride) < 1 or any(not 0 <= 2 * pad <= size for pad, size in zip(padding, window, strict=True)):
        return "MaxPool3d has sizes that torch refuses"
    return ""


def _interference(module: nn.Module) -> str:
    """What makes calling a module more than calling its class's `forward`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        if hooks and not all(getattr(hook, "watches_only", False) for hook in hooks.values()):
            return "hooks"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "a forward of its own"
    return ""


def has_global_hooks() -> bool:
    """Whether torch calls something around every module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def needs_every_module() -> bool:
    """Whether torch calls something around every module, or records what each of them does for elsewhere."""
    return has_global_hooks() or is_recorded_for_elsewhere()


def chain_length(
    modules: Sequence[nn.Module], start: int, leave: Callable[[int], bool], in_any_mode: bool = False
) -> int:
    """How many of `modules` from `start` on run as one pass; 1 where nothing is gained.

    Args:
        modules: in the order in which they are called.
        start: index of the first.
        leave: whether the module at an index must be called as it is for a reason of the caller's.
        in_any_mode: leave out what `train()` and `eval()` change.
    """
    if link_of(modules[start]) == "instance normalization":
        return _norm_chain_length(modules, start, leave, in_any_mode)
    next_link, length = 0, 0
    for index in range(start, len(modules)):
        link = link_of(modules[index])
        if link not in CONVOLUTION_CHAIN or (index == start) != (link == "convolution"):
            break
        if CONVOLUTION_CHAIN.index(link) < next_link or leave(index) or obstacle(modules[index], in_any_mode):
            break
        next_link, length = CONVOLUTION_CHAIN.index(link) + 1, length + 1
    saves_nothing = length == 2 and isinstance(modules[start + 1], (nn.SiLU, nn.GELU))
    return 1 if saves_nothing else max(length, 1)


def _norm_chain_length(
    modules: Sequence[nn.Module], start: int, leave: Callable[[int], bool], in_any_mode: bool
) -> int:
    for index in range(start, len(modules)):
        link = link_of(modules[index])
        is_first, is_last = index == start, link == "PReLU" or isinstance(modules[index], (nn.ReLU, nn.LeakyReLU))
        if not (is_first or is_last or link == "dropout") or leave(index) or obstacle(modules[index], in_any_mode):
            break
        if is_last:
            return index - start + 1
    return 1


def run(modules: Sequence[nn.Module], x: Any, leave: Callable[[int], bool] = lambda index: False) -> Any:
    """What calling `modules` one after the other on `x` returns, chains among them in one pass."""
    position = 0
    while position < len(modules):
        length = chain_length(modules, position, leave) if isinstance(x, Tensor) else 1
        x = modules[position](x) if length == 1 else _run_watched(modules[position : position + length], x)
        position += length
    return x


def _run_watched(chain: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Hooks that say of themselves that they watch only (the profiler's) see the chain as its first module."""
    first = chain[0]
    for hook in first._forward_pre_hooks.values():
        hook(first, (x,))
    y = _run_norm_chain(chain, x) if isinstance(first, nn.InstanceNorm3d) else _run_chain(chain, x)
    for hook in first._forward_hooks.values():
        hook(first, (x,), y)
    return y


def _run_norm_chain(chain: Sequence[nn.Module], x: Tensor) -> Tensor:
    norm, *links = chain
    activation = links[-1]
    assert isinstance(norm, nn.InstanceNorm3d)
    # Of another number of channels the module complains or warns.
    if x.dim() == 5 and x.shape[1] == norm.num_features:
        y = instance_norm_activation(
            x,
            norm.weight,
            norm.bias,
            activation.weight if isinstance(activation, nn.PReLU) else None,
            eps=norm.eps,
            activation="none" if isinstance(activation, nn.PReLU) else activation_name(activation),
            negative_slope=activation.negative_slope if isinstance(activation, nn.LeakyReLU) else NEGATIVE_SLOPE,
            keep_channels_last=getattr(norm, "keeps_channels_last", False),
        )
        if y is not None:
            return y
    x = norm.forward(x)
    for module in links:
        x = module(x)
    return x


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


def activation_name(module: nn.Module | None) -> Activation:
    """What this package calls an activation module."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}
    return "none" if module is None else names[type(module)]


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
    if isinstance(first, nn.InstanceNorm3d) or link_of(last) == "pool":
        return f"{links} in one pass"
    if link_of(last) == "activation" and has_activation_in_the_pass(cast("Tensor", first.weight)):
        return f"{links} in one pass"
    if isinstance(last, nn.LeakyReLU) and not last.inplace:
        return f"{links}, in place without gradients"
    return f"{links}, in place" if isinstance(last, (nn.ReLU, nn.LeakyReLU)) else f"{links}, folded"
