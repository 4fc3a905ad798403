"""Models to compile, each beside its accelerated copy."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from ..fusion.models import settle

FORMATS = (torch.contiguous_format, torch.channels_last_3d)


class Code(nn.Module):
    """Forward code with chains, a branch on the mode and a skip connection."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4)
        self.inner = nn.Conv3d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose3d(4, 4, 3, 2, 1, 1)
        self.pool = nn.MaxPool3d(2)

    def stem(self, x):
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x, scale: float = 2.0):
        x = self.stem(x)
        if self.training:
            x = x * scale
        return x + self.up(self.pool(F.relu(self.inner(x))))


def sequential():
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 4, 3, padding="same", bias=False),
        nn.BatchNorm3d(4),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose3d(4, 4, 3, 2, 1, 1),
        nn.InstanceNorm3d(4, affine=True),
        nn.Conv3d(4, 4, 2, padding="same"),
        nn.SiLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 2, 3, padding=1, padding_mode="replicate"),
    )


MODELS = {"sequential": sequential, "code": Code}


def pair(name, layout=torch.contiguous_format, train=False):
    """(model of torch, accelerated copy)."""
    reference = settle(MODELS[name]()).train(train).to(memory_format=layout)
    return reference, pyvolconv.accelerate(copy.deepcopy(reference))


def sample(batch=2, size=(8, 6, 10), layout=torch.contiguous_format):
    return torch.randn(batch, 3, *size).contiguous(memory_format=layout)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
