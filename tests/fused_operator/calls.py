"""The function under test, the same put together from torch's, and operands for both."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

import pyvolconv

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
GEOMETRY = {"padding": 1, "groups": 2, "stride": (1, 2, 1)}
POOLS = {
    "2ceil": {"pool_size": 2, "ceil_mode": True},
    "3s2p1": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "1x2x2": {"pool_size": (1, 2, 2)},
}
WITH_PASSES = ("cpp", "numba")
WITHOUT_PASSES = ("im2col", "aten")
"""The operator puts their plain pass and torch's pooling together."""


def ours(activation="relu", pool="2ceil", **geometry):
    options = {**(geometry or GEOMETRY), **POOLS[pool], "activation": activation, "negative_slope": 0.2}
    return lambda x, w, b=None: pyvolconv.conv3d_max_pool(x, w, b, **options)


def theirs(activation="relu", pool="2ceil", **geometry):
    sizes = POOLS[pool]
    window = sizes["pool_size"]
    arguments = (sizes.get("pool_stride", window), sizes.get("pool_padding", 0), 1, sizes.get("ceil_mode", False))
    geometry = geometry or GEOMETRY

    def function(x, w, b=None):
        return F.max_pool3d(ACTIVATIONS[activation](F.conv3d(x, w, b, **geometry)), window, *arguments)

    return function


def operands(dtype=torch.float64, size=(4, 6, 5), layout=torch.contiguous_format, batch=2):
    x, w = torch.randn(batch, 4, *size, dtype=dtype), torch.randn(6, 2, 2, 3, 2, dtype=dtype)
    several = (x.contiguous(memory_format=layout), w.contiguous(memory_format=layout), torch.randn(6, dtype=dtype))
    return tuple(tensor.requires_grad_() for tensor in several)


ACTIVATION_AND_POOL = [
    *itertools.product(ACTIVATIONS, ["2ceil"]),
    ("relu", "3s2p1"),
    ("silu", "3s2p1"),
    ("relu", "1x2x2"),
]
