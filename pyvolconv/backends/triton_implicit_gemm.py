"""Implicit GEMM in Triton whose threads gather: float32 and 16-bit floats, on CUDA or in Triton's interpreter.

The kernels are imported when the first convolution runs. Triton decides at that moment whether they are
compiled or interpreted (TRITON_INTERPRET=1), for the rest of the process.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..problem import ConvProblem, Pass
from . import cuda_peak
from .triton_base import CALL_SECONDS, TritonLaunches, multiplication
from .triton_support import geometry, missing_here


class TritonImplicitGemm(TritonLaunches):
    """Implicit GEMM whose threads compute addresses and masks: any sizes, strides, dilations and groups."""

    name: ClassVar[str] = "triton.implicit_gemm"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        return missing_here(problem)

    def launches(self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None], result: Tensor) -> list[Any]:
        from ..kernels.triton_blocks import Blocks
        from ..kernels.triton_forward import forward
        from ..kernels.triton_grad_input import grad_input
        from ..kernels.triton_grad_weight import grad_weight

        make: Any = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}[pass_]
        blocks = Blocks.parse(self.configuration) if self.configuration else None
        made: list[Any] = make(*operands, *geometry(problem), result, **multiplication(problem), blocks=blocks)
        return made

    def configurations(self, problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
        if problem.device == "cpu":
            return ()
        columns = problem.in_channels if pass_ == "grad_input" else problem.out_channels
        wide = columns // problem.groups > 64
        if pass_ == "grad_weight":
            return ("m64n128k32w4s3", "m64n64k64w4s3", "m128n128k32w8s3", "m64n128k64w8s3")
        return (
            ("m128n128k32w8s3", "m128n128k64w8s4", "m128n256k64w8s3", "m256n128k32w8s3")
            if wide
            else ("m128n64k32w4s3", "m128n32k32w4s3", "m256n64k32w8s3", "m256n32k32w8s3", "m64n64k32w4s4")
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Estimates, not yet measured on a GPU: a third of the peak, less the padding of `tl.dot` to 16, and memory.

        In the interpreter, which is for tests, next to nothing.
        """
        if problem.device == "cpu":
            return 1e-6
        reached = 0.35 * min(1.0, min(problem.in_channels, problem.out_channels) / problem.groups / 16)
        return cuda_peak.share_of_peak(problem, pass_, reached, call_seconds=CALL_SECONDS)
