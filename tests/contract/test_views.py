"""Inputs and weights that are views: expanded, permuted, sliced, flipped, overlapping."""

from __future__ import annotations

import pytest
import torch

from .layers import assert_same_outcome, outcome, pair

# A view of shape (2, 4, 5, 6, 7), of a base of another shape.
VIEWS = {
    "permuted": ((7, 6, 5, 4, 2), lambda base: base.permute(4, 3, 2, 1, 0)),
    "channels moved": ((2, 5, 6, 7, 4), lambda base: base.movedim(-1, 1)),
    "sliced": ((2, 8, 5, 12, 9), lambda base: base[:, ::2, :, ::2, 1:8]),
    "flipped": ((2, 4, 5, 6, 7), lambda base: base.flip(-1, 2)),
    "expanded batch": ((1, 4, 5, 6, 7), lambda base: base.expand(2, -1, -1, -1, -1)),
    "expanded channels": ((2, 1, 5, 6, 7), lambda base: base.expand(-1, 4, -1, -1, -1)),
    "expanded voxels": ((2, 4, 1, 1, 7), lambda base: base.expand(-1, -1, 5, 6, -1)),
    "one number": ((), lambda base: base.expand(2, 4, 5, 6, 7)),
    "windows": ((2, 4, 5, 12), lambda base: base.unfold(-1, 7, 1)),
    "windows that overlap in part": ((2, 4, 5, 17), lambda base: base.unfold(-1, 7, 2)),
    "at an odd address": ((2 * 4 * 5 * 6 * 7 + 1,), lambda base: base[1:].view(2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_inputs(kind, name, view, dtype):
    shape, make = VIEWS[view]
    ours, theirs = pair(kind, name, 4, 6, 3, padding=1, dtype=dtype)
    # Integers, whose sums cancel exactly or not at all.
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.data = other.data = torch.randint(-2, 3, other.shape).to(dtype)
    base = torch.randint(-2, 3, shape).to(dtype).requires_grad_()
    got, expected = outcome(ours, make(base)), outcome(theirs, make(base))
    assert expected.shape[0] == 2
    assert_same_outcome(got, expected)
    gradients = torch.autograd.grad(got.sum(), [base, *ours.parameters()])
    expected_gradients = torch.autograd.grad(expected.sum(), [base, *theirs.parameters()])
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_same_outcome(gradient, wanted)


@pytest.mark.parametrize("view", VIEWS)
def test_weights(kind, name, view):
    """A weight that is a view, as `functional_call` and what computes weights hand them over."""
    shape, make = VIEWS[view]
    channels = (4, 2) if name == "Conv3d" else (2, 4)
    ours, theirs = pair(kind, name, *channels, (5, 6, 7))
    x = torch.randint(-2, 3, (2, channels[0], 6, 7, 8)).float()
    base = torch.randint(-2, 3, shape).float().requires_grad_()
    results = []
    for layer in (ours, theirs):
        y = torch.func.functional_call(layer, {"weight": make(base), "bias": torch.ones(8)[:: 8 // channels[1]]}, (x,))
        results.append((y, torch.autograd.grad(y.sum(), base)[0]))
    for got, expected in zip(*results, strict=True):
        assert_same_outcome(got, expected)
