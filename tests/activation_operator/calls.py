"""The function under test, the same put together from torch's, and operands for both."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

import pyvolconv

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.25),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
GEOMETRY = {"padding": ((2, 0), (1, 1), (0, 1)), "groups": 2, "stride": (1, 2, 1)}
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
CASES = list(itertools.product(ACTIVATIONS, [False, True]))
"""(activation, whether there is a residual)"""


def ours(activation="relu", **geometry):
    options = {**(geometry or GEOMETRY), "activation": activation, "negative_slope": 0.25}
    return lambda x, w, b=None, r=None: pyvolconv.conv3d_activation(x, w, b, residual=r, **options)


def theirs(activation="relu", **geometry):
    padding, rest = (geometry or GEOMETRY)["padding"], {**(geometry or GEOMETRY), "padding": 0}
    sides = [side for pair in reversed(padding) for side in pair]

    def function(x, w, b=None, r=None):
        y = F.conv3d(F.pad(x, sides), w, b, **rest)
        return ACTIVATIONS[activation](y if r is None else y + r)

    return function


def outcome(function, *args):
    """(result, None), or (None, torch's error)."""
    try:
        return function(*args), None
    except (RuntimeError, NotImplementedError) as error:
        return None, error


def operands(dtype=torch.float64, residual=True, size=(4, 6, 5), layout=torch.contiguous_format, integers=False):
    """x, w, b and, if wanted, a residual, which all require a gradient if their dtype has one."""

    def tensor(*shape):
        values = torch.randint(-3, 4, shape) if integers else torch.randn(shape, dtype=torch.float64)
        return values.to(dtype).contiguous(memory_format=layout if len(shape) == 5 else torch.contiguous_format)

    several = [tensor(2, 4, *size), tensor(6, 2, 2, 3, 2), tensor(6)]
    if residual:
        several.append(tensor(*theirs("none")(*several).shape))
    return tuple(operand.requires_grad_(dtype != torch.int64) for operand in several)
