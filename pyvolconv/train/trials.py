"""Each path on trial, before anything is timed: its better layout, how many samples it can have, its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..cost.timing import now
from .steps import Candidate, PathSpec, candidate

PROBE_SAMPLES = 4
SLACK = 2.0
"""How much longer than allowed a step may be on trial, which is noisy, before it gets fewer samples."""


def fitted(
    specs: Sequence[PathSpec],
    make_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    longest_step: float,
    until: float = math.inf,
) -> Candidate:
    """The best of some layouts of one path, on as many samples as are expected to take at most `longest_step` seconds.

    Each is tried on one sample after a warm-up, in which kernels may be compiled, then on a few, then on all: the first
    layout in any case, the others and more samples as long as they are fast enough and `now()` is before `until`. A GPU
    takes the whole batch: it is fast enough on every path, and few samples take it as long.
    """

    def seconds_per_sample(spec: PathSpec) -> float:
        if x.is_cuda:
            probe = candidate(spec, make_model, x, y, x.shape[0])
            probe.step()
            return min(_seconds(probe.step) for _ in range(3)) / x.shape[0]
        probe = candidate(spec, make_model, x, y, 1)
        probe.step()
        seconds = _seconds(probe.step)
        for samples in sorted({min(PROBE_SAMPLES, x.shape[0]), x.shape[0]}):
            if seconds * samples < longest_step and now() < until:
                probe = candidate(spec, make_model, x, y, samples)
                probe.step()
                seconds = min(_seconds(probe.step) for _ in range(2)) / samples
        return seconds

    tried: dict[PathSpec, float] = {}
    for spec in specs:
        if not tried or now() < until:
            tried[spec] = seconds_per_sample(spec)
    best = min(tried, key=lambda spec: tried[spec])
    samples = x.shape[0]
    untried = tuple(spec.layout for spec in specs if spec not in tried and spec.layout)
    if x.is_cuda:
        return replace(candidate(best, make_model, x, y, samples), untried=untried)
    if tried[best] * samples > SLACK * longest_step and now() < until:
        # Once more: a neighbour on the machine is enough to make a step look slow.
        tried[best] = min(tried[best], seconds_per_sample(best))
    if tried[best] * samples > SLACK * longest_step:
        samples = min(samples, max(1, int(longest_step / tried[best])))
    return replace(candidate(best, make_model, x, y, samples), untried=untried)


def gradient_difference(one: Candidate, make_model: Callable[[], nn.Module], x: Tensor, y: Tensor) -> float:
    """How far the path's parameter gradients are from torch's in float64: |g - g64| / |g64|, on a few samples.

    In float64, because torch's own float32 is no yardstick: where two voxels of a window are equal up to rounding, each
    path may choose another one, and the gradient follows.
    """
    samples = min(one.samples, PROBE_SAMPLES)
    fresh = candidate(one.spec, make_model, x, y, samples)
    plain = replace(one.spec, backend=None, fused=False, dense_backward=False, tf32=None, graph=False)
    exact = candidate(plain, lambda: make_model().double(), x.double(), y, samples)
    gradients = []
    for path in (fresh, exact):
        path.step()
        gradients.append(torch.cat([p.grad.flatten() for p in path.model.parameters() if p.grad is not None]).double())
    found, expected = gradients
    return float((found - expected).norm() / expected.norm())


def _seconds(step: Callable[[], None]) -> float:
    start = now()
    step()
    return now() - start
