"""Our layers beside torch's, and what came of a call on both: results with strides, or errors with their words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyvolconv

from ..closeness import assert_close

KINDS = ("module", "accelerated")
NAMES = ("Conv3d", "ConvTranspose3d")
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, pyvolconv.Conv3d | pyvolconv.ConvTranspose3d)


def make_ours(kind: str, theirs: nn.Module, name: str, *args: Any, **options: Any) -> nn.Module:
    """What stands in for `theirs`, with the same parameters."""
    if kind == "accelerated":
        return pyvolconv.accelerate(copy.deepcopy(theirs))
    ours: nn.Module = getattr(pyvolconv, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours


def pair(kind: str, name: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's) with the same parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(nn, name)(*args, **options)
        ours = make_ours(kind, theirs, name, *args, **options)
    assert is_ours(ours)
    assert not is_ours(theirs)
    return ours, theirs


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the error that it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    except Exception as error:
        return error


def used_strides(tensor: Tensor) -> list[int]:
    """Strides of the axes that have more than one place; the others are never used."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def description(result: Any) -> Any:
    """What must be equal of two outcomes, values aside."""
    if isinstance(result, Exception):
        return type(result), str(result)
    if not isinstance(result, Tensor):
        return result
    return result.shape, result.dtype, result.device, result.layout, result.requires_grad


def assert_same_outcome(got: Any, expected: Any) -> None:
    """An error of the same class in the same words, or a result of the same shape, dtype, device and values."""
    assert description(got) == description(expected)
    if isinstance(expected, Tensor) and expected.device.type != "meta":
        assert_close(got, expected)


def small_integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1, 0 and 1, so that short sums are exact in every dtype; 0 and 1 where there are no signs."""
    least = -1 if dtype.is_signed and dtype != torch.bool else 0
    values = torch.randint(least, 2, shape)
    return (values + 1j * torch.randint(least, 2, shape) if dtype.is_complex else values).to(dtype)
