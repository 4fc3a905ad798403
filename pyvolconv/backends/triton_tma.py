"""Implicit GEMM fed by the tensor memory accelerator of Hopper and later GPUs: stride 1, one group, dense channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..problem import DTYPE_BYTES, ConvProblem, Pass
from . import cuda_peak
from .base import geometry
from .triton_base import CALL_SECONDS, EpilogueLaunches, input_precision, multiplication
from .triton_support import missing_here
from .triton_tma_ways import Way, seconds, ways

if TYPE_CHECKING:
    from ..kernels.triton_epilogue import Epilogue


class TritonTma(EpilogueLaunches):
    """Implicit GEMM whose operands the tensor memory accelerator fetches, padding included."""

    name: ClassVar[str] = "triton.tma"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = missing_here(problem)
        if not reasons and problem.device == "cuda":
            if torch.version.hip is not None or not (9, 0) <= torch.cuda.get_device_capability() < (12, 0):
                # 12.x has the accelerator too, but 99 KB of shared memory, less than half of what blocks take.
                reasons.append(
                    "needs a tensor memory accelerator and 227 KB of shared memory: compute capability 9.0 to 11.x"
                )
            elif problem.dtype == "float32" and input_precision(problem) == "ieee":
                reasons.append("float32 in full precision has no matrix unit to feed")
        if problem.groups != 1:
            reasons.append(f"groups={problem.groups}: it takes 1")
        if problem.stride != (1, 1, 1):
            reasons.append(f"stride={problem.stride}: it takes 1")
        padded = [size + begin + end for size, (begin, end) in zip(problem.input_size, problem.padding, strict=True)]
        if max(padded) >= 2**31:
            reasons.append(f"{max(padded)} voxels along an axis, padding included: coordinates have 32 bits")
        bytes_ = DTYPE_BYTES[problem.dtype]
        for name, channels in _described(problem, pass_):
            if channels * bytes_ % 16:
                reasons.append(f"{name}={channels}: rows of {channels * bytes_} bytes are no multiple of 16")
        return reasons

    def launches(
        self,
        problem: ConvProblem,
        pass_: Pass,
        operands: list[Tensor | None],
        result: Tensor,
        epilogue: Epilogue | None = None,
    ) -> list[Any]:
        from ..kernels import triton_tma
        from ..kernels.triton_tma_grad_weight import grad_weight
        from ..kernels.triton_transpose import channels_last

        way = Way.parse(self.configuration) if self.configuration else ways(problem, pass_)[0]
        if way.moved and problem.layout == "ndhwc":
            raise ValueError(f"{self.configuration!r} copies ncdhw into ndhwc, and this is ndhwc already")
        first, second, *bias = operands
        assert first is not None
        assert second is not None
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
        options = multiplication(problem)
        if epilogue is not None:
            options["epilogue"] = epilogue
        return [*before, *triton_tma.forward(first, second, *bias, *sizes, **options)]

    def configurations(self, problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
        return tuple(map(str, ways(problem, pass_)[1:])) if problem.device == "cuda" else ()

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """By the model of `triton_tma_ways`; in the interpreter, which is for tests, next to nothing."""
        if problem.device == "cpu":
            return 1e-6
        expected = seconds(problem, pass_, ways(problem, pass_)[0])
        at_peak = problem.flops(pass_) / cuda_peak.PEAK[cuda_peak.arithmetic(problem)]
        return at_peak / max(expected, CALL_SECONDS)


def _described(problem: ConvProblem, pass_: Pass) -> list[tuple[str, int]]:
    """What is dense in the tensors that have descriptors."""
    into, out = ("in_channels", problem.in_channels), ("out_channels", problem.out_channels)
    return {"forward": [into], "grad_input": [out, into], "grad_weight": [out, into]}[pass_]


def _aligned(tensor: Tensor) -> Tensor:
    """Descriptors start at multiples of 16 bytes, which is where tensors start unless they are parts of others."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
