"""The short way of a call that is made again and again: its arguments are checked and its problem is made once.

A call whose operands have the shapes, strides, dtypes and devices of an earlier one, and whose other arguments are the
same, is the same convolution. Where it is ordinary (`ordinary.is_ordinary`) and its operands are dense, nothing is left
to do but to ask the dispatcher who computes, and, where something is differentiated, to make the autograd node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import conv3d_arguments, conv_transpose3d_sizes
from .backends.base import MEMORY_FORMAT
from .derivatives import CONV3D, CONV3D_GRAD_INPUT, BilinearFunction
from .dispatch import choose, run
from .ops import conv3d_problem, layout_of
from .ordinary import is_ordinary
from .problem import ConvProblem

MOST_CALLS = 4096

Call = TypeVar("Call")


@dataclass(frozen=True)
class Conv3dCall:
    """`conv3d` of operands that fit `problem`, dense in its layout."""

    problem: ConvProblem
    args: tuple[Any, ...]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_differentiated(x, weight, bias):
            return self.run(x, weight, bias)
        y: Tensor = BilinearFunction.apply(CONV3D, self.run, x, weight, bias, *self.args)  # type: ignore[attr-defined]
        return y

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        """The result alone."""
        return run(choose(self.problem, "forward").forward, self.problem, "forward", x, weight, bias)


@dataclass(frozen=True)
class TransposedCall:
    """`conv_transpose3d` of operands that fit `problem`, whose input is the result, dense in its layout.

    Attributes:
        problem: the convolution whose gradient this is.
        args: what the operator takes after the operands.
        missing: zeros to append, as `F.pad` takes them.
    """

    problem: ConvProblem
    args: tuple[Any, ...]
    missing: tuple[int, ...]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not any(self.missing) and not is_differentiated(x, weight, bias):
            return run(choose(self.problem, "grad_input").transposed, self.problem, "grad_input", x, weight, bias)
        y: Tensor
        if is_differentiated(x, weight):
            y = BilinearFunction.apply(CONV3D_GRAD_INPUT, self.run, x, weight, *self.args)  # type: ignore[attr-defined]
        else:
            y = self.run(x, weight)
        if any(self.missing):
            y = F.pad(y, self.missing)
        # In place: nobody else has y, and no derivative needs it.
        return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))

    def run(self, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        """The gradient alone."""
        return run(choose(self.problem, "grad_input").grad_input, self.problem, "grad_input", x, weight)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd needs a node for a function of these."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def call_of(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Conv3dCall | None:
    """The call that `conv3d` is with these arguments, or None where it must go the long way."""
    return remembered(_calls, plain_call, input, weight, bias, *rest)


def transposed_call_of(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> TransposedCall | None:
    """As `call_of`, for `conv_transpose3d`."""
    return remembered(_transposed_calls, transposed_call, input, weight, bias, *rest)


def remembered(
    calls: dict[Any, Call | None], make: Callable[..., Call | None], input: Any, weight: Any, bias: Any, *rest: Any
) -> Call | None:
    """What `make(input, weight, bias, *rest)` returned for equal arguments before; None if the call is not ordinary.

    Args:
        calls: what was made before.
        make: its result may depend on shapes, strides, dtypes and devices of the operands, and on `rest`.
        input, weight, bias: operands, bias or None; anything else gives None.
        rest: numbers, strings, None, and tuples of ints or of pairs of ints; anything else gives None.
    """
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor) or not isinstance(bias, _TENSOR_OR_NONE):
        return None
    if not is_ordinary(input, weight, bias):
        return None
    # 1, True and 1.0 are equal, but torch takes only one of them for a size.
    kinds = tuple(map(type, rest))
    if not _KINDS.issuperset(kinds):
        return None
    for value in rest:
        if type(value) is tuple and not _INT.issuperset(map(type, value)) and not all(map(_is_pair, value)):
            return None
    key = (
        (input.shape, input.stride(), input.dtype, weight.shape, weight.stride(), weight.dtype),
        (input.get_device(), weight.get_device()),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.get_device()),
        kinds,
        rest,
    )
    try:
        return calls[key]
    except KeyError:
        if len(calls) >= MOST_CALLS:
            calls.clear()
        call = calls[key] = make(input, weight, bias, *rest)
        return call


def _is_pair(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and _INT.issuperset(map(type, value))


def plain_call(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Conv3dCall | None:
    """The call of `conv3d` with these arguments, if operands are dense and not empty and it is a convolution."""
    args = conv3d_arguments(input, weight, bias, *geometry)
    if args is None or not _are_dense(input, weight, bias):
        return None
    layout = layout_of(input, weight)
    return Conv3dCall(conv3d_problem(input.shape, weight.shape, args, input, layout, bias is not None), args)


def transposed_call(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> TransposedCall | None:
    """As `plain_call`, for `conv_transpose3d`."""
    sizes = conv_transpose3d_sizes(input, weight, bias, *geometry)
    if sizes is None or not _are_dense(input, weight, bias):
        return None
    size, args, missing = sizes
    shape = (input.shape[0], weight.shape[1] * args[3], *size)
    problem = conv3d_problem(shape, weight.shape, args, input, layout_of(input, weight))
    return TransposedCall(problem, (size, *args), tuple(missing))


def _are_dense(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether operands that make a convolution have a batch, are not empty and lie dense in one layout."""
    if input.dim() != 5 or not input.numel() or (bias is not None and not bias.is_contiguous()):
        return False
    memory_format = MEMORY_FORMAT[layout_of(input, weight)]
    return input.is_contiguous(memory_format=memory_format) and weight.is_contiguous(memory_format=memory_format)


_INT = frozenset({int})
_KINDS = frozenset({int, float, bool, str, tuple, type(None)})
_TENSOR_OR_NONE = (Tensor, type(None))
_calls: dict[Any, Conv3dCall | None] = {}
_transposed_calls: dict[Any, TransposedCall | None] = {}
