"""Which modules may be links of a chain (`chains`), and how many of those that follow one another are one.

Everything that may change between calls (hooks, training mode, replaced modules) is looked at in every call, so a
module is never skipped that would have done anything else than its torch class says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .arguments import triple
from .batch_norm import uses_batch_statistics
from .elsewhere import is_recorded_for_elsewhere
from .epilogue import LARGEST_WINDOW, Activation, Size3
from .nn import BatchNorm3d, Conv3d, InstanceNorm3d

Link = Literal["convolution", "normalization", "activation", "pool", "instance normalization", "PReLU", "dropout"]

_LINKS: dict[type[nn.Module], Link] = {
    Conv3d: "convolution",
    nn.Conv3d: "convolution",
    BatchNorm3d: "normalization",
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


def wrapped_by(module: nn.Module) -> tuple[str, nn.Sequential] | None:
    """(name, child) where calling the module is calling a plain Sequential that it has, and nothing more, as proven."""
    passes_on: tuple[str, Callable[[nn.Module], bool]] | None = vars(type(module)).get("_pyvolconv_passes_on")
    if passes_on is None or _interference(module):
        return None
    name, holds = passes_on
    child = module._modules.get(name)
    is_plain = isinstance(child, nn.Sequential) and is_plain_sequential(child) and holds(module)
    return (name, cast("nn.Sequential", child)) if is_plain else None


def flatten(sequential: nn.Sequential, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what a plain Sequential calls, in order, plain Sequentials inside it opened up."""
    for name, module in sequential._modules.items():
        if isinstance(module, nn.Sequential) and is_plain_sequential(module):
            yield from flatten(module, f"{path}{name}.")
        elif module is not None and (wrapped := wrapped_by(module)) is not None:
            yield from flatten(wrapped[1], f"{path}{name}.{wrapped[0]}.")
        elif module is not None:
            yield f"{path}{name}", module


def obstacle(module: nn.Module, in_any_mode: bool = False) -> str:
    """Why a link must be called as it is, in words; empty when nothing forbids its fusion.

    Args:
        module: one for which `link_of` names a link.
        in_any_mode: leave out what `train()` and `eval()` change.
    """
    original = original_class(module)
    if why := obstacle_of_class(module):
        return why
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


def obstacle_of_class(module: nn.Module) -> str:
    """What makes calling a module more than what the class in `_LINKS` does."""
    original = original_class(module)
    if original not in _LINKS:
        base = next(torch_class for torch_class in _LINKS if isinstance(module, torch_class))
        return f"{original.__name__} is a subclass of {base.__name__}"
    interference = _interference(module)
    return f"{original.__name__} has {interference}" if interference else ""


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
    modules: Sequence[nn.Module],
    start: int,
    leave: Callable[[int], bool] = lambda index: False,
    in_any_mode: bool = False,
) -> int:
    """How many of `modules` from `start` on run as one pass; 1 where nothing is gained.

    Args:
        modules: in the order in which they are called.
        start: index of the first.
        leave: whether the module at an index must be called as it is for a reason of the caller's.
        in_any_mode: leave out what `train()` and `eval()` change.
    """
    if _starts_norm_chain(modules[start], in_any_mode):
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


def _starts_norm_chain(module: nn.Module, in_any_mode: bool) -> bool:
    if isinstance(module, nn.BatchNorm3d):
        return in_any_mode or uses_batch_statistics(module)
    return link_of(module) == "instance normalization"


def _norm_chain_length(
    modules: Sequence[nn.Module], start: int, leave: Callable[[int], bool], in_any_mode: bool
) -> int:
    for index in range(start, len(modules)):
        link = link_of(modules[index])
        is_first, is_last = index == start, link == "PReLU" or isinstance(modules[index], (nn.ReLU, nn.LeakyReLU))
        if not (is_first or is_last or link == "dropout") or leave(index):
            break
        # A BatchNorm3d in front may train, and keep no statistics.
        is_batch_norm = is_first and link == "normalization"
        if obstacle_of_class(modules[index]) if is_batch_norm else obstacle(modules[index], in_any_mode):
            break
        if is_last:
            return index - start + 1
    return 1


def activation_name(module: nn.Module | None) -> Activation:
    """What this package calls an activation module."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}
    return "none" if module is None else names[type(module)]


@contextmanager
def watched(module: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Shows hooks that say of themselves that they watch only (the profiler's) what stands in a module's place.

    The block puts its result into the list.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, (x,))
    result: list[Tensor] = []
    yield result
    for hook in module._forward_hooks.values():
        hook(module, (x,), *result)
