"""`with patch():` gives torch's own 3-D convolution functions this package's arithmetic, for code that calls them.

A mode of torch functions hears of every call of torch's Python API in its thread before it is carried out, whatever
name it was imported by. Nothing is replaced in torch, so nothing has to be put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .functional import conv3d, conv_transpose3d

_OURS: Mapping[Any, Callable[..., Any]] = {torch.conv3d: conv3d, torch.conv_transpose3d: conv_transpose3d}
_NAMES_OF_INPUT = ("x", "a", "x1")
"""torch takes NumPy's names for a first argument called `input`, in all of its functions."""


class patch(ContextDecorator, TorchFunctionMode):  # noqa: N801 - used as a function, as torch.no_grad is
    """Have this package compute `F.conv3d` and `F.conv_transpose3d` of this thread inside the block.

    For code that calls the functions of `torch.nn.functional` (or the same ones by their names in `torch`) instead of
    modules, which is what `accelerate` does not reach; `nn.Conv3d` and `nn.ConvTranspose3d` call them too. Arguments,
    results and errors are those of torch. Gradients are ours wherever `backward()` runs. Blocks nest, are of one thread
    each, and work as a decorator of a function; an exception ends them as any other. `torch.compile` sees them inside
    and outside of what it compiles.

    As every mode of torch functions it costs each call of a torch function in the block some microseconds, so where a
    model's convolutions are modules, `accelerate` is the better choice; both together work too.

    Not heard of: functions of `torch.jit.script`, `torch.convolution`, the operators of `torch.ops`, and what a
    checkpoint computes anew during `backward()`, while torch has modes off. Where a generator or a coroutine waits
    inside the block, whoever runs meanwhile in the same thread is inside of it too, as with every mode of torch.

    Raises:
        What torch raises; UnsupportedProblemError (from the convolution) when a forced backend cannot run it.

    Example:
        >>> import torch, pyvolconv
        >>> import torch.nn.functional as F
        >>> x, w = torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3)
        >>> with pyvolconv.patch(), pyvolconv.use_backend("numba"):
        ...     y = F.conv3d(x, w)
        >>> y.shape, y.unique().item()
        (torch.Size([1, 3, 2, 2, 2]), 54.0)
    """

    def __init__(self, *wrapped: Any) -> None:
        if wrapped:
            raise TypeError("patch() takes no arguments; to decorate a function write @pyvolconv.patch() above it")
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What `func(*args, **kwargs)` returns, or NotImplemented where a tensor's class comes first."""
        kwargs = kwargs or {}
        ours = _OURS.get(func)
        if ours is None:
            return func(*args, **kwargs)
        if types:
            # The classes of operands hear of torch's function, as they do without us; what they call then comes here.
            return NotImplemented
        return ours(*args, **{"input" if name in _NAMES_OF_INPUT else name: value for name, value in kwargs.items()})
