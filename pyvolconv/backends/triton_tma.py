"""Implicit GEMM fed by the tensor memory accelerator of Hopper and later GPUs: stride 1, one group, dense channels.

A configuration is "BLOCKS-SPLITS", e.g. "m256n128k64w8s4-1", and in ncdhw "-direct" or "-moved" after it: boxes are runs
along the width of the tensor as it lies, or the tensor is first copied into ndhwc; the result is written in ncdhw.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..problem import DTYPE_BYTES, ConvProblem, Pass
from .triton_base import TritonLaunches, input_precision, multiplication
from .triton_support import geometry, missing_here

if TYPE_CHECKING:
    from ..kernels.triton_blocks import Blocks

PROCESSORS = 132
"""Multiprocessors of a large Hopper GPU: how sums are split follows from the problem, never from the device."""


class _Way(NamedTuple):
    """A configuration, parsed."""

    blocks: Blocks
    splits: int
    moved: bool

    def __str__(self) -> str:
        return f"{self.blocks}-{self.splits}" + ("-moved" if self.moved else "")


class TritonTma(TritonLaunches):
    """Implicit GEMM whose operands the tensor memory accelerator fetches, padding included."""

    name: ClassVar[str] = "triton.tma"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = missing_here(problem)
        if not reasons and problem.device == "cuda":
            if torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0):
                reasons.append("needs a tensor memory accelerator: compute capability 9.0 or more")
            elif problem.dtype == "float32" and input_precision(problem) == "ieee":
                reasons.append("float32 in full precision has no matrix unit to feed")
        if problem.groups != 1:
            reasons.append(f"groups={problem.groups}: it takes 1")
        if problem.stride != (1, 1, 1):
            reasons.append(f"stride={problem.stride}: it takes 1")
        bytes_ = DTYPE_BYTES[problem.dtype]
        for name, channels in _described(problem, pass_):
            if channels * bytes_ % 16:
                reasons.append(f"{name}={channels}: rows of {channels * bytes_} bytes are no multiple of 16")
        return reasons

    def launches(self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None], result: Tensor) -> list[Any]:
        from ..kernels import triton_tma
        from ..kernels.triton_tma_grad_weight import grad_weight
        from ..kernels.triton_transpose import channels_last

        way = self._way(problem, pass_)
        first, second, *bias = operands
        assert first is not None and second is not None
        first, second = _aligned(first), _aligned(second)
        before = []
        if way.moved:
            first, launch = channels_last(first)
            before.append(launch)
            if pass_ == "grad_weight":
                second, launch = channels_last(second)
                before.append(launch)
        _, padding, dilation, _ = geometry(problem)
        sizes = (padding, dilation, result, way.blocks, way.splits)
        if pass_ == "grad_weight":
            return [*before, *grad_weight(first, second, *sizes, **multiplication(problem))]
        if pass_ == "grad_input":
            return [*before, *triton_tma.grad_input(first, second, *sizes, **multiplication(problem))]
        return [*before, *triton_tma.forward(first, second, *bias, *sizes, **multiplication(problem))]

    def configurations(self, problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
        if problem.device == "cpu":
            return ()
        return tuple(str(way) for way in _ways(problem, pass_))

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Estimates, not yet measured on a GPU."""
        if problem.device == "cpu":
            return 1e-6
        return 0.6 * min(1.0, problem.in_channels / 64, problem.out_channels / 64) + 0.05

    def _way(self, problem: ConvProblem, pass_: Pass) -> _Way:
        from ..kernels.triton_blocks import Blocks

        if not self.configuration:
            return _default(problem, pass_)
        blocks, splits, *moved = self.configuration.split("-")
        return _Way(Blocks.parse(blocks), int(splits), moved == ["moved"])


def _described(problem: ConvProblem, pass_: Pass) -> list[tuple[str, int]]:
    """What is dense in the tensors that have descriptors."""
    into, out = ("in_channels", problem.in_channels), ("out_channels", problem.out_channels)
    return {"forward": [into], "grad_input": [out, into], "grad_weight": [out, into]}[pass_]


def _aligned(tensor: Tensor) -> Tensor:
    """Descriptors start at multiples of 16 bytes, which is where tensors start unless they are parts of others."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _can_be_direct(problem: ConvProblem, pass_: Pass) -> bool:
    width = problem.input_size[2] if pass_ == "forward" else problem.output_size[2]
    both = (width, problem.input_size[2]) if pass_ == "grad_weight" else (width,)
    return problem.dtype != "float32" and all(one * DTYPE_BYTES[problem.dtype] % 16 == 0 for one in both)


def _default(problem: ConvProblem, pass_: Pass) -> _Way:
    return _ways(problem, pass_)[0]


def _ways(problem: ConvProblem, pass_: Pass) -> list[_Way]:
    """What is worth timing, the most promising first."""
    from ..kernels.triton_blocks import Blocks

    narrow = 2 if problem.dtype == "float32" else 1
    interpreted = problem.device == "cpu"
    ways = []
    if pass_ == "grad_weight":
        cuts = [(128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4)]
        rows, columns = problem.out_channels, problem.in_channels
        for m, n, k, warps, stages in cuts:
            if (m > 64 and m >= 2 * rows) or (n > 32 and n >= 2 * columns):
                continue
            tiles = -(-rows // m) * -(-columns // n) * math.prod(problem.kernel_size)
            for splits in sorted({max(1, 132 // tiles), max(1, 264 // tiles), max(1, 528 // tiles)}):
                ways.append(_Way(Blocks(m, n, k // narrow, warps, stages), splits, False))
    else:
        source, columns = problem.in_channels, problem.out_channels
        size = problem.output_size
        if pass_ == "grad_input":
            source, columns, size = columns, source, problem.input_size
        voxels = problem.batch * math.prod(size)
        cuts = [
            (256, 128, 64, 8, 4),
            (128, 128, 64, 8, 4),
            (128, 256, 64, 8, 4),
            (256, 64, 64, 8, 4),
            (128, 64, 64, 4, 4),
            (64, 64, 64, 4, 4),
        ]
        for m, n, k, warps, stages in cuts:
            if n > 64 and n >= 2 * columns:
                continue
            k = k if source % 64 == 0 or source > 128 else 32 if source > 16 else 16
            tiles = -(-voxels // m) * -(-columns // n)
            steps = math.prod(problem.kernel_size) * -(-source // k)
            possible = {1} if tiles >= PROCESSORS else {1, max(1, min(PROCESSORS // tiles, steps // 8))}
            for splits in sorted(possible, reverse=True):
                ways.append(_Way(Blocks(m, n, k // narrow, warps, stages), splits, False))
    if interpreted:
        ways = [_Way(Blocks(64, 64, 32, 4, 3), ways[0].splits, False)]
    if problem.layout == "ndhwc":
        return ways
    moved = [way._replace(moved=True) for way in ways]
    direct = ways if _can_be_direct(problem, pass_) and not interpreted else []
    return [*moved[:1], *direct, *moved[1:]]
