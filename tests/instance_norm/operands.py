"""Modules and operands of the tests of instance and batch normalization."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv
from pyvolconv.backends import cpp_instance_norm
from pyvolconv.instance_norm import batch_norm_activation, instance_norm_activation

compiled = pytest.mark.skipif(not cpp_instance_norm.is_available(), reason="no compiled module")

LAYOUTS = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}
ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "one_slope": lambda: nn.PReLU(init=0.3),
    "slopes": lambda: nn.PReLU(6, init=-0.1),
}
KINDS = {"instance": (2, 3, 4), "batch": (0, 2, 3, 4)}
"""The axes that share statistics."""
SHAPES = [(2, 6, 5, 4, 7), (1, 6, 33, 31, 30), (6, 6, 1, 2, 3), (1, 6, 1, 1, 2), (40, 6, 3, 4, 5)]


def pair(channels=6, **options):
    """torch's module and ours with the same parameters, none of them trivial."""
    theirs, ours = nn.InstanceNorm3d(channels, **options), pyvolconv.InstanceNorm3d(channels, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def settings(activation):
    """What `instance_norm_activation` takes for an activation of ACTIVATIONS."""
    if activation in ("one_slope", "slopes"):
        return {}
    return {"activation": activation, "negative_slope": 0.2}


def normalized(kind, x, weight, bias, slopes=None, **options):
    """By ours, in the layout of x."""
    if kind == "batch":
        return batch_norm_activation(x, weight, bias, slopes, **options)
    return instance_norm_activation(x, weight, bias, slopes, keep_channels_last=True, **options)


def by_torch(kind, activation, x, weight, bias, slopes, eps=1e-5):
    if kind == "batch":
        z = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    else:
        z = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if slopes is not None:
        return F.prelu(z, slopes)
    return {"none": lambda: z, "relu": lambda: F.relu(z), "leaky_relu": lambda: F.leaky_relu(z, 0.2)}[activation]()


def operands(activation, channels=6, dtype=torch.float32, affine=True):
    """weight, bias, slopes."""
    weight, bias = (torch.randn(channels).to(dtype) if affine else None for _ in range(2))
    slopes = {"one_slope": torch.tensor([0.3]), "slopes": torch.randn(channels)}.get(activation)
    return weight, bias, None if slopes is None else slopes.to(dtype)


def leaves(*tensors, dtype=None):
    return [None if one is None else one.detach().to(dtype or one.dtype).requires_grad_() for one in tensors]


def models(*layers):
    """A model of torch's, and its copy, accelerated."""
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, pyvolconv.accelerate(copy.deepcopy(model), keep_channels_last=True)


def chain(activation):
    return models(nn.InstanceNorm3d(6, affine=True), nn.Dropout(0.0), ACTIVATIONS[activation]())
