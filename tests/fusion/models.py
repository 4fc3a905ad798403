"""Models with chains, and what several tests do with a model and its accelerated copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import pyvolconv

from ..closeness import assert_close

CHAIN = "Conv3d + ReLU + MaxPool3d in one pass"


def small(seed=0):
    return torch.randn(2, 3, 8, 9, 7, generator=torch.Generator().manual_seed(seed))


def settle(model):
    """Running statistics that are not the identity, so that a wrong fold shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def rows(model):
    return {row.module: (row.became, row.why_not) for row in pyvolconv.fusion_report(model).rows}


def assert_same(model, reference, *inputs):
    """Results and gradients of every parameter, and of the inputs."""
    several = []
    for module in (model, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        module.zero_grad()
        y = module(*leaves)
        y.pow(2).sum().backward()
        several.append((y, [*(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())]))
    (y, gradients), (exact_y, exact_gradients) = several
    torch.testing.assert_close(y, exact_y, rtol=1e-4, atol=1e-4)
    # That of a bias in front of a norm is the rounding noise of sums as large as the other gradients.
    noise = 1e-5 * max(float(gradient.abs().max()) for gradient in exact_gradients)
    torch.testing.assert_close(gradients, exact_gradients, rtol=1e-4, atol=max(1e-4, noise))


def assert_same_in_training(model, reference):
    model.train()
    reference.train()
    results = []
    for module in (model, reference):
        torch.manual_seed(0)
        results.append(module(small()))
    assert_close(*results)
    assert_close(model.state_dict(), reference.state_dict())


class Ordinary(nn.Module):
    """Forward code as people write it: modules and functions, a helper, a loop, a mode, a skip connection."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 4, 3, padding=1, bias=False)
        self.block = nn.Sequential(nn.Conv3d(4, 4, 1), nn.LeakyReLU(0.1))
        self.layers = nn.ModuleList([nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)])
        self.skip = nn.Conv3d(4, 4, 1)
        self.pool = nn.MaxPool3d(2, ceil_mode=True)
        self.fc = nn.Linear(4, 2)
        self.rate = 0.5

    def stem(self, x):
        return F.relu(self.norm1(self.conv1(x)))

    def forward(self, x, scale=1.0):
        x = self.pool(self.stem(x))
        x = F.max_pool3d(torch.relu(self.conv2(x)), 2, ceil_mode=True)
        x = self.pool(self.block(x))
        for layer in self.layers:
            x = F.relu(layer(x), inplace=True)
        y = self.skip(x)
        x = y + F.relu(y)
        if self.training:
            x = F.dropout(x, self.rate)
        return self.fc(x.mean((2, 3, 4))) * scale


SEQUENTIALS = {
    "conv relu pool": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool3d(2)), CHAIN),
    "conv pool": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d(2)),
        "Conv3d + MaxPool3d in one pass",
    ),
    "leaky relu, overlapping pool": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, 2), nn.LeakyReLU(0.3), nn.MaxPool3d(3, 2, 1)),
        "Conv3d + LeakyReLU + MaxPool3d in one pass",
    ),
    "silu": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding="same"), nn.SiLU(), nn.MaxPool3d((1, 2, 2))),
        "Conv3d + SiLU + MaxPool3d in one pass",
    ),
    "gelu": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.GELU("tanh"), nn.MaxPool3d(2, ceil_mode=True)),
        "Conv3d + GELU + MaxPool3d in one pass",
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv3d(3, 4, 3)), nn.ReLU()), nn.MaxPool3d(2)),
        CHAIN,
    ),
    "without a pool": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), "Conv3d + ReLU, in place"),
    "norm": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)).eval(),
        "Conv3d + BatchNorm3d + ReLU + MaxPool3d in one pass",
    ),
    "norm without bias and affine": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, bias=False), nn.BatchNorm3d(4, affine=False), nn.SiLU()).eval(),
        "Conv3d + BatchNorm3d + SiLU, folded",
    ),
    "norm alone": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)).eval(),
        "Conv3d + BatchNorm3d, folded",
    ),
}


class Code(nn.Module):
    """Forward code given as a function of (self, x)."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv3d(3, 3, 1), nn.ReLU(), nn.MaxPool3d(2)
        self.seen = []
        self.calls = 0
        self.register_forward_hook(lambda module, args, output: None)

    @property
    def slope(self):
        return 1.0
