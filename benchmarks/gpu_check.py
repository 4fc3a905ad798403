"""Whether a result on the GPU is right: against float64 sums over some channels, at every voxel of them.

The float64 pass is made of matrix products, one per tap, and knows no convolution of torch's. Of a large result it
covers the first, the last and a few other channels; all of them are compared with torch's result by their norm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvolconv.backends.base import Accuracy
from pyvolconv.problem import ConvProblem, Pass

MOST_CHANNELS = 6
MOST_BYTES = 4 * 2**30
"""Of float64 products that are held at a time, where the batch can be cut into pieces."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch allocates without a value for it is filled with NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


class Reference:
    """The float64 result of a pass for some channels, and what its error bound is a multiple of.

    Args:
        problem, pass_: what the operands are of.
        operands: in the order of a backend's arguments, without bias, in any layout.
    """

    def __init__(self, problem: ConvProblem, pass_: Pass, operands: list[Tensor]) -> None:
        self.problem, self.pass_ = problem, pass_
        self.out_channels = _some(problem.out_channels)
        self.in_channels = _some(problem.in_channels)
        self.group_channels = _some(problem.in_channels // problem.groups)
        self.exact = self._sums(*operands)
        self.magnitude = self._sums(*(operand.abs() for operand in operands))

    def error(self, result: Tensor, accuracy: Accuracy) -> float:
        """The largest error as a multiple of the bound that `accuracy` states; infinite where there is a NaN."""
        if any(accuracy.reach):
            raise ValueError(f"{accuracy}: sums that mix neighbouring voxels have no reference here")
        unit = torch.finfo(getattr(torch, accuracy.accumulate_dtype)).eps
        kept = torch.finfo(result.dtype)
        bound = accuracy.constant * unit * self.problem.reduction_length(self.pass_) * self.magnitude
        bound += kept.eps * self.exact.abs() + kept.tiny * kept.eps * (self.magnitude > 0)
        error = (self._part(result).double() - self.exact).abs()
        ratio = torch.where(bound > 0, error / bound, torch.where(error == 0, 0.0, math.inf))
        return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max())

    def _part(self, result: Tensor) -> Tensor:
        if self.pass_ == "grad_weight":
            return result[self.out_channels][:, self.group_channels].flatten(2)
        return result[:, self.out_channels if self.pass_ == "forward" else self.in_channels]

    def _sums(self, *operands: Tensor) -> Tensor:
        sums: Tensor = getattr(self, f"_{self.pass_}")(*operands)
        return sums

    def _forward(self, x: Tensor, weight: Tensor) -> Tensor:
        windows = _Windows(self.problem, x)
        rows = x.new_zeros(windows.voxels, len(self.out_channels), dtype=torch.float64)
        channels = self.problem.in_channels // self.problem.groups
        for group, places in _by_group(self.out_channels, self.problem.out_channels // self.problem.groups):
            some = weight[[self.out_channels[place] for place in places]].flatten(2).double()
            part = rows[:, places]
            for tap in range(windows.taps):
                part.addmm_(windows.rows(tap, slice(group * channels, (group + 1) * channels)), some[:, :, tap].T)
            rows[:, places] = part
        return rows.view(self.problem.batch, *self.problem.output_size, -1).movedim(-1, 1)

    def _grad_input(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        problem = self.problem
        out_channels, channels = problem.out_channels // problem.groups, problem.in_channels // problem.groups
        taps = math.prod(problem.kernel_size)
        voxel_bytes = 8 * (out_channels + len(self.in_channels) * taps) * math.prod(problem.output_size)
        piece = max(1, MOST_BYTES // voxel_bytes)
        result = []
        for samples in grad_output.split(piece):
            padded = [
                size + begin + end for size, (begin, end) in zip(problem.input_size, problem.padding, strict=True)
            ]
            target = samples.new_zeros(len(samples), len(self.in_channels), *padded, dtype=torch.float64)
            for group, places in _by_group(self.in_channels, channels):
                outputs = slice(group * out_channels, (group + 1) * out_channels)
                some = weight[outputs, [self.in_channels[place] % channels for place in places]].flatten(1).double()
                rows = samples[:, outputs].movedim(1, -1).reshape(-1, out_channels).double()
                products = (rows @ some).view(len(samples), *problem.output_size, len(places), taps)
                for tap in range(taps):
                    met = target[(slice(None), slice(None), *_met(problem, tap))]
                    for nth, place in enumerate(places):
                        met[:, place] += products[..., nth, tap]
            inside = (
                slice(begin, begin + size) for size, (begin, _) in zip(problem.input_size, problem.padding, strict=True)
            )
            result.append(target[(slice(None), slice(None), *inside)])
        return torch.cat(result)

    def _grad_weight(self, grad_output: Tensor, x: Tensor) -> Tensor:
        windows = _Windows(self.problem, x)
        channels = self.problem.in_channels // self.problem.groups
        result = x.new_zeros(len(self.out_channels), len(self.group_channels), windows.taps, dtype=torch.float64)
        # Several sums at a time: one long sum into few results would keep few multiprocessors busy.
        sums = next(count for count in range(512, 0, -1) if windows.voxels % count == 0)
        for group, places in _by_group(self.out_channels, self.problem.out_channels // self.problem.groups):
            grads = grad_output[:, [self.out_channels[place] for place in places]].movedim(1, -1)
            grads = grads.reshape(sums, -1, len(places)).double().mT
            sources = [group * channels + channel for channel in self.group_channels]
            for tap in range(windows.taps):
                rows = windows.rows(tap, sources).view(sums, -1, len(sources))
                result[places, :, tap] = (grads @ rows).sum(0)
        return result


class _Windows:
    """The input voxels that meet each tap, as rows of channels, one row for each output voxel."""

    def __init__(self, problem: ConvProblem, x: Tensor) -> None:
        self.problem = problem
        self.taps = math.prod(problem.kernel_size)
        self.voxels = problem.batch * math.prod(problem.output_size)
        self.x = F.pad(x, [side for pair in reversed(problem.padding) for side in pair])

    def rows(self, tap: int, channels: slice | list[int]) -> Tensor:
        met = self.x[(slice(None), slice(None), *_met(self.problem, tap))][:, channels]
        return met.movedim(1, -1).reshape(self.voxels, -1).double()


def _met(problem: ConvProblem, tap: int) -> Iterator[slice]:
    """Per axis the voxels of the padded input that a tap meets."""
    _, height, width = problem.kernel_size
    places = (tap // (height * width), tap // width % height, tap % width)
    for place, dilation, stride, size in zip(
        places, problem.dilation, problem.stride, problem.output_size, strict=True
    ):
        yield slice(place * dilation, place * dilation + (size - 1) * stride + 1, stride)


def _some(channels: int) -> list[int]:
    """The first, the last and random ones between, in order."""
    if channels <= MOST_CHANNELS:
        return list(range(channels))
    between = (1 + torch.randperm(channels - 2))[: MOST_CHANNELS - 2].tolist()
    return [0, *sorted(between), channels - 1]


def _by_group(channels: list[int], per_group: int) -> Iterator[tuple[int, list[int]]]:
    """Each group that has some of the channels, with their places in the list."""
    for group, members in itertools.groupby(range(len(channels)), key=lambda place: channels[place] // per_group):
        yield group, list(members)


def relative_difference(result: Tensor, other: Tensor) -> float:
    """The norm of their difference over that of the other one, all channels and voxels; infinite with a NaN."""
    difference = float((result.float() - other.float()).norm() / other.float().norm())
    return difference if math.isfinite(difference) else math.inf
