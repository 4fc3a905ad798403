"""Depthwise and small-group convolution in Triton: what has too few channels at a time for a tensor core.

The kernels are imported when the first convolution runs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..problem import ConvProblem, Pass
from . import cuda_peak
from .base import Accuracy, geometry
from .triton_base import CALL_SECONDS, TritonLaunches
from .triton_support import missing_here

LARGEST_GROUP = 8
"""Most channels of a group, of input and of output; each is a loop over all taps."""

LARGEST_PLANE = 64
"""Most taps in a plane of the kernel: loops over them are unrolled."""

MULTIPLY_ADDS_PER_SECOND = 33.5e12
"""Float32, outside of tensor cores, of a Hopper GPU."""

REACHED = 0.5
"""Share of these bounds expected; estimated, not yet measured."""


class TritonDepthwise(TritonLaunches):
    """Direct sums in registers, in float32; bitwise reproducible in all three passes."""

    name: ClassVar[str] = "triton.depthwise"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = missing_here(problem)
        largest = max(problem.in_channels, problem.out_channels) // problem.groups
        if problem.groups == 1 or largest > LARGEST_GROUP:
            reasons.append(
                f"convolves several groups of up to {LARGEST_GROUP} channels, not {problem.groups} of {largest}"
            )
        _, height, width = problem.kernel_size
        if height * width > LARGEST_PLANE:
            reasons.append(f"takes up to {LARGEST_PLANE} taps in a plane of the kernel, not {height} x {width}")
        return reasons

    def launches(self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None], result: Tensor) -> list[Any]:
        from ..kernels.triton_depthwise import forward, grad_input
        from ..kernels.triton_depthwise_grad_weight import grad_weight
        from ..kernels.triton_depthwise_tiles import Cut

        make: Any = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}[pass_]
        cut = Cut.parse(self.configuration) if self.configuration else None
        made: list[Any] = make(*operands, *geometry(problem), result, cut=cut)
        return made

    def configurations(self, problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
        from ..kernels.triton_depthwise_tiles import cuts

        if problem.device == "cpu":
            return ()
        depth = problem.output_size[0]
        if pass_ == "grad_input":
            depth = -(-problem.input_size[0] // problem.stride[0])
        return tuple(map(str, cuts(depth)))

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """A plain sum in float32, never in TF32."""
        return Accuracy(constant=1.0, accumulate_dtype="float32", bitwise_reproducible=True)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """From the longer of two bounds, moving each byte once and multiplying outside of tensor cores.

        In the interpreter, which is for tests, next to nothing, though more than the other backends of this family.
        """
        if problem.device == "cpu":
            return 2e-6
        flops = max(problem.flops(pass_), 1)
        moving = problem.min_bytes(pass_) / cuda_peak.BYTES_PER_SECOND
        multiplying = flops / 2 / MULTIPLY_ADDS_PER_SECOND
        seconds = max(max(moving, multiplying) / REACHED, CALL_SECONDS)
        return flops / cuda_peak.PEAK[cuda_peak.arithmetic(problem)] / seconds
