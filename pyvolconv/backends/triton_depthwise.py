"""Depthwise and small-group convolution in Triton: what has too few channels at a time for a tensor core.

Supported where `triton` is; the kernels are imported when the first convolution runs.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .triton_support import device_of, geometry, missing_here

LARGEST_GROUP = 8
"""Most channels of a group, of input and of output; each is a loop over all taps."""

LARGEST_PLANE = 64
"""Most taps in a plane of the kernel: loops over them are unrolled."""

COPY_BYTES_PER_SECOND = 4.3e12
"""What a large copy reaches on an H200."""

MULTIPLY_ADDS_PER_SECOND = 33.5e12
"""Float32, outside of tensor cores, of a Hopper GPU."""

PEAK_FLOPS = 790e12
"""Of 16-bit matrix products on a Hopper GPU: the unit in which `TritonBackend` states its expected efficiency too."""

REACHED = 0.5
"""Share of these bounds expected; estimated, not yet measured."""


class TritonDepthwise(Backend):
    """Direct sums in registers, in float32; bitwise reproducible in all three passes."""

    name: ClassVar[str] = "triton.depthwise"
    family: ClassVar[str] = "triton"

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

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from ..kernels.triton_depthwise import forward

        y = empty(problem, "output", like=x)
        launch = forward(x, weight, bias, *geometry(problem), y)
        with device_of(y):
            launch.run()
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        from ..kernels.triton_depthwise import grad_input

        grad_x = empty(problem, "input", like=grad_output)
        launch = grad_input(grad_output, weight, *geometry(problem), grad_x)
        with device_of(grad_x):
            launch.run()
        return grad_x

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        from ..kernels.triton_depthwise_grad_weight import grad_weight

        grad_w = empty(problem, "weight", like=x)
        launches = grad_weight(grad_output, x, *geometry(problem), grad_w)
        with device_of(grad_w):
            for launch in launches:
                launch.run()
        return grad_w

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """A plain sum in float32, never in TF32."""
        return Accuracy(constant=1.0, accumulate_dtype="float32", bitwise_reproducible=True)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """From the longer of two bounds, moving each byte once and multiplying outside of tensor cores.

        In the interpreter, which is for tests, next to nothing, though more than the other backend of this family.
        """
        if problem.device == "cpu":
            return 2e-6
        flops = problem.flops(pass_)
        moving = problem.min_bytes(pass_) / COPY_BYTES_PER_SECOND
        multiplying = flops / 2 / MULTIPLY_ADDS_PER_SECOND
        return REACHED * flops / max(moving, multiplying) / PEAK_FLOPS
