"""Implicit GEMM in Triton whose threads gather: float32 and 16-bit floats, on CUDA or in Triton's interpreter.

The kernels are imported when the first convolution runs. Triton decides at that moment whether they are
compiled or interpreted (TRITON_INTERPRET=1), for the rest of the process.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..problem import DTYPE_BYTES, ConvProblem, Pass
from . import cuda_peak
from .base import geometry
from .triton_base import CALL_SECONDS, EpilogueLaunches, multiplication
from .triton_pooled import PooledLaunches, pooled_configurations, share_of_products_needed
from .triton_support import missing_here

if TYPE_CHECKING:
    from ..kernels.triton_epilogue import Epilogue

GATHERED_PER_SECOND = 3e12
"""Values of a large GPU that its threads gather one by one."""


class TritonImplicitGemm(EpilogueLaunches, PooledLaunches):
    """Implicit GEMM whose threads compute addresses and masks: any sizes, strides, dilations, groups and pools."""

    name: ClassVar[str] = "triton.implicit_gemm"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        return missing_here(problem)

    def launches(
        self,
        problem: ConvProblem,
        pass_: Pass,
        operands: list[Tensor | None],
        result: Tensor,
        epilogue: Epilogue | None = None,
    ) -> list[Any]:
        from ..kernels.triton_blocks import Blocks
        from ..kernels.triton_forward import forward
        from ..kernels.triton_grad_input import grad_input
        from ..kernels.triton_grad_weight import grad_weight

        make: Any = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}[pass_]
        blocks = Blocks.parse(self.configuration) if self.configuration else None
        options = multiplication(problem)
        if epilogue is not None:
            options["epilogue"] = epilogue
        made: list[Any] = make(*operands, *geometry(problem), result, **options, blocks=blocks)
        return made

    def configurations(self, problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
        from ..kernels.triton_blocks import Blocks

        if problem.device == "cpu":
            return ()
        if problem.pool is not None:
            return pooled_configurations(problem, pass_)
        columns = problem.in_channels if pass_ == "grad_input" else problem.out_channels
        if pass_ == "grad_weight":
            cuts = [(64, 128, 32, 4, 3), (64, 64, 64, 4, 3), (128, 128, 32, 8, 3), (64, 128, 64, 8, 3)]
        elif columns // problem.groups > 64:
            cuts = [(128, 128, 32, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 32, 8, 3)]
        else:
            cuts = [
                (128, 64, 32, 4, 3),
                (128, 32, 32, 4, 3),
                (256, 64, 32, 8, 3),
                (256, 32, 32, 8, 3),
                (64, 64, 32, 4, 4),
            ]
        # Operands of a step take the same shared memory in every dtype.
        wider = DTYPE_BYTES[problem.dtype] // 2
        return tuple(str(Blocks(m, n, k // wider, warps, stages)) for m, n, k, warps, stages in cuts)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Estimates, not yet measured on a GPU: a third of the peak, less the padding of `tl.dot` to 16, and memory.

        Few summed channels are gathered tap by tap, which takes longer than their products. In the interpreter, which
        is for tests, next to nothing.
        """
        if problem.device == "cpu":
            return 1e-6
        summed, columns = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        if pass_ == "grad_input":
            summed, columns = columns, summed
        gathered = 0.0
        if summed < 16:
            gathered = math.prod(problem.output_shape[2:]) * problem.batch * problem.reduction_length("forward")
            summed *= math.prod(problem.kernel_size)
        reached = 0.35 * _filled(summed) * _filled(columns) * share_of_products_needed(problem, pass_)
        waiting = problem.groups * gathered / GATHERED_PER_SECOND * cuda_peak.BYTES_PER_SECOND
        return cuda_peak.share_of_peak(problem, pass_, reached, waiting, CALL_SECONDS)


def _filled(size: int) -> float:
    """Share in use of a side of a product that is rounded up to 16."""
    return size / (-(-size // 16) * 16)
