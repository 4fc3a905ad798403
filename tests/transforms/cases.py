"""Functions and models with what torch computes in their place, and the comparison that every test here makes."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyvolconv


def _pooled(x, w, b=None, *, activation=lambda y: y, **geometry):
    return F.max_pool3d(activation(F.conv3d(x, w, b, **geometry)), 2)


def _fused(activation):
    return lambda x, w, b=None, **geometry: pyvolconv.conv3d_max_pool(x, w, b, activation=activation, **geometry)


def _activated(x, w, b=None, **geometry):
    return F.leaky_relu(F.conv3d(x, w, b, **geometry))


def _in_one_pass(x, w, b=None, **geometry):
    return pyvolconv.conv3d_activation(x, w, b, activation="leaky_relu", **geometry)


FUNCTIONS = {
    "conv3d": (pyvolconv.conv3d, F.conv3d),
    "conv_transpose3d": (pyvolconv.conv_transpose3d, F.conv_transpose3d),
    "conv3d_activation": (_in_one_pass, _activated),
    "conv3d_max_pool": (pyvolconv.conv3d_max_pool, _pooled),
    "relu": (_fused("relu"), lambda *args, **geometry: _pooled(*args, activation=F.relu, **geometry)),
    "leaky_relu": (_fused("leaky_relu"), lambda *args, **geometry: _pooled(*args, activation=F.leaky_relu, **geometry)),
    "silu": (_fused("silu"), lambda *args, **geometry: _pooled(*args, activation=F.silu, **geometry)),
}
PAIRS = [pytest.param(*pair, id=name) for name, pair in FUNCTIONS.items()]


def operands(dtype=torch.float64, requires_grad=True, channels=4, size=4):
    """x, weight and bias that all functions take with any number of groups that divides `channels`."""
    x, w = torch.randn(2, channels, size, size, size), torch.randn(channels, channels, 3, 2, 3)
    several = (x, w, torch.randn(channels))
    return tuple(tensor.to(dtype).requires_grad_(requires_grad) for tensor in several)


MODELS = {
    "modules": lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2, 2), nn.Tanh()
    ),
    "fused": lambda: nn.Sequential(
        *(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv3d(4, 3, 1), nn.SiLU(), nn.MaxPool3d(2)),
    ),
    "leaky": lambda: nn.Sequential(
        *(nn.Conv3d(2, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.MaxPool3d(2)),
        *(nn.Conv3d(4, 4, 1), nn.GELU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(4, 2, 1), nn.LeakyReLU(0.2)),
    ),
    "normalized": lambda: nn.Sequential(
        *(nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4), nn.LeakyReLU(0.2)),
    ).eval(),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """(accelerated, as torch has it), with the same float64 parameters."""
    theirs = MODELS[request.param]().double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return pyvolconv.accelerate(copy.deepcopy(theirs)), theirs


def sample(*shape):
    return torch.randn(*(shape or (3, 2, 4, 4, 4)), dtype=torch.float64)


class Called(TorchDispatchMode):
    """How often each of this package's operators ran in the block, by name."""

    def __enter__(self):
        self.times = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyvolconv":
            self.times[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def outcome(function, *args, **kwargs):
    """(result, None), or (None, the error); the random numbers that it draws are the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return function(*args, **kwargs), None
        except Exception as error:
            return None, error


def assert_same(check, ours, theirs, **tolerance):
    """`check(function)` of ours returns what it does of theirs, or raises the same error, with the same warnings."""
    with warnings.catch_warnings(record=True) as our_warnings:
        warnings.simplefilter("always")
        got, error = outcome(check, ours)
    with warnings.catch_warnings(record=True) as their_warnings:
        warnings.simplefilter("always")
        expected, expected_error = outcome(check, theirs)
    if error is not None and expected_error is None:
        raise error
    assert type(error) is type(expected_error)
    assert str(error) == str(expected_error)
    assert _told(our_warnings) <= _told(their_warnings)
    torch.testing.assert_close(got, expected, **tolerance)


def _told(recorded):
    """Of what torch itself says once per process, whoever comes first: nothing."""
    return {str(warning.message) for warning in recorded if "torch.jit" not in str(warning.message)}
