"""`torch.profiler` shows every pass under its operator's name, also where unprofiled calls take the short way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyvolconv

from .models import FORMATS, assert_close, sample

CPU = [torch.profiler.ProfilerActivity.CPU]


def events(function, profile):
    with profile as profiled:
        function()
    return {row.key: row.count for row in profiled.key_averages() if row.key.startswith("pyvolconv::")}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "profile", [lambda: torch.profiler.profile(activities=CPU), lambda: torch.autograd.profiler.profile(use_cpu=True)]
)
def test_names_of_all_passes(profile, layout):
    model = nn.Sequential(
        nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)
    ).to(memory_format=layout)
    model.append(nn.ConvTranspose3d(4, 2, 2, 2))
    pyvolconv.accelerate(model)
    x = sample(layout=layout)
    forward = {"conv3d": 1, "conv3d_max_pool": 1, "conv3d_grad_input": 1}
    assert events(lambda: model(x), profile()) == {f"pyvolconv::{name}": count for name, count in forward.items()}
    with torch.no_grad():
        assert events(lambda: model(x), profile()) == {f"pyvolconv::{name}": count for name, count in forward.items()}
    y = model(x)
    # Of the transposed convolution: a convolution and a gradient for its weight; of the first, none for its input.
    backward = {
        "conv3d": 1,
        "conv3d_grad_weight": 2,
        "conv3d_max_pool_grad_input": 1,
        "conv3d_max_pool_grad_weight": 1,
    }
    got = events(y.sum().backward, profile())
    assert got == {f"pyvolconv::{name}": count for name, count in backward.items()}


def test_result_and_gradients_are_the_same_when_profiled():
    layer = pyvolconv.Conv3d(3, 4, 3, padding=1)
    x = sample().requires_grad_()

    def run():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    expected = run()
    with torch.profiler.profile(activities=CPU, record_shapes=True, with_stack=True, profile_memory=True) as profiled:
        assert_close(run(), expected)
    rows = {row.key: row for row in profiled.key_averages(group_by_input_shape=True)}
    assert rows["pyvolconv::conv3d"].input_shapes[:2] == [list(x.shape), list(layer.weight.shape)]
