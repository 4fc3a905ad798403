"""Networks of others compute the same, as far as torch's own float32 says what the same is."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import pyvolconv

from .agreement import measure

pytestmark = pytest.mark.clients
CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last_3d
# What the dispatcher takes may be torch's own kernel, so that ours are also forced.
WAYS = {
    "as dispatched": (CONTIGUOUS, nullcontext),
    "as dispatched, channels last": (CHANNELS_LAST, nullcontext),
    "cpp": (CONTIGUOUS, lambda: pyvolconv.use_backend("cpp")),
    "cpp, channels last": (CHANNELS_LAST, lambda: pyvolconv.use_backend("cpp")),
}


def accelerated(model, memory_format=CONTIGUOUS):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):  # others have parameters of rank 4, which have no such format
            module.to(memory_format=memory_format)
    return pyvolconv.accelerate(model)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_results_are_as_near_to_the_exact_ones_as_those_of_torch(client, gradients):
    measured = measure(client.build, gradients)
    for way, (memory_format, forced) in WAYS.items():
        with forced():
            results = measured.by(accelerated(measured.network.model, memory_format))
        measured.assert_agrees(results, way)


def test_a_planted_fault_of_one_tap_shows(client):
    """The middle tap of one channel in one of the layers, off by a tenth of what weights are there."""
    measured = measure(client.build, gradients=True)
    model = accelerated(measured.network.model)
    layers = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    layer = layers[len(layers) // 2]
    depth, height, width = (size // 2 for size in layer.kernel_size)
    with torch.no_grad():
        layer.weight[0, :, depth, height, width] += 0.1 * layer.weight.std()
    with pytest.raises(AssertionError, match="errors as multiples of what torch's own float32 allows"):
        measured.assert_agrees(measured.by(model), "one wrong tap")
