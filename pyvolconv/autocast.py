"""What `torch.autocast` makes of the operands of a convolution.

It casts them when the call is made and leaves derivatives alone: a gradient has the dtype of its forward call wherever
the backward pass runs. Inside of `vmap` it casts nothing, because that takes torch's convolutions apart before autocast
sees them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
KEYS = {
    device: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")) for device in DEVICES
}
_EVERY_DEVICE = KEYS["cpu"] | KEYS["cuda"]


def dtype_in_autocast(tensor: Tensor) -> torch.dtype:
    """The dtype in which a convolution called here and now takes an operand.

    Inside of autocast for the operand's device, that of autocast for every floating-point dtype but float64; else its
    own.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     dtype_in_autocast(torch.zeros(1)), dtype_in_autocast(torch.zeros(1).double())
        (torch.bfloat16, torch.float64)
    """
    device = tensor.device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return tensor.dtype
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def outside_autocast() -> AbstractContextManager[object]:
    """A block in which operators of this package take their operands as they are."""
    # The guard makes a thread look unusual to `ordinary`, so it is set where it is needed alone.
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    guard: AbstractContextManager[object] = torch._C._ExcludeDispatchKeyGuard(_EVERY_DEVICE)
    return guard


def is_hidden_by_vmap() -> bool:
    """Whether autocast is on and a call made here and now is mapped by `vmap` before anything else is done to it."""
    if torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled():
        return False
    if not torch._C._are_functorch_transforms_active():
        return False
    return torch._C._functorch.peek_interpreter_stack().key() == torch._C._functorch.TransformType.Vmap
