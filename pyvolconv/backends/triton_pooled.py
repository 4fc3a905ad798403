"""Convolution, activation and max-pool as one implicit GEMM in Triton, with its gradients: part of a backend.

Any pool and activation. What is pooled, and its gradient, exist in registers only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..problem import ConvProblem, Pass
from .base import MEMORY_FORMAT, empty, geometry
from .triton_base import TritonLaunches, multiplication
from .triton_support import device_of


class PooledLaunches(TritonLaunches):
    """A backend of launches that has the passes fused with a max-pool too; bitwise reproducible as the others."""

    def forward_max_pool(
        self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pooled, code = empty(problem, "pooled", x), empty(problem, "code", x)
        self._run_pooled(problem, "forward", [x, weight, bias], [pooled, code])
        return pooled, code

    def max_pool(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pooled = empty(problem, "pooled", x)
        self._run_pooled(problem, "forward", [x, weight, bias], [pooled, None])
        return pooled

    def grad_input_max_pool(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        grad_x = empty(problem, "input", grad)
        self._run_pooled(problem, "grad_input", [grad, code, weight], [grad_x])
        return grad_x

    def grad_weight_max_pool(
        self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        grad_w = empty(problem, "weight", x)
        grad_b = x.new_empty(problem.out_channels) if problem.bias else None
        self._run_pooled(problem, "grad_weight", [grad, code, x], [grad_w, grad_b])
        return grad_w, grad_b

    def _run_pooled(
        self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None], results: list[Tensor | None]
    ) -> None:
        with device_of(operands[0]):  # type: ignore[arg-type]
            for launch in self.pooled_launches(problem, pass_, operands, results):
                launch.run()

    def pooled_launches(
        self, problem: ConvProblem, pass_: Pass, operands: list[Tensor | None], results: list[Tensor | None]
    ) -> list[Any]:
        """What writes a fused pass of the operands into the results, in order."""
        from ..kernels.triton_blocks import Blocks
        from ..kernels.triton_pooled_forward import forward
        from ..kernels.triton_pooled_grad_input import grad_input
        from ..kernels.triton_pooled_grad_weight import grad_weight

        if problem.pool is None:
            raise ValueError(f"{problem} has no pool; the fused passes need one")
        make: Any = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}[pass_]
        activation = (problem.activation, problem.negative_slope) if pass_ == "forward" else ()
        pool = (problem.pool.window, problem.pool.stride, problem.pool.padding, problem.output_size)
        made: list[Any] = make(
            *operands,
            *geometry(problem),
            *activation,
            *pool,
            *results,
            channels_last=problem.layout == "ndhwc",
            blocks=Blocks.parse(self.configuration) if self.configuration else None,
            **multiplication(problem),
        )
        return made

    def prepare(self, problem: ConvProblem, pass_: Pass) -> None:
        if problem.pool is None:
            super().prepare(problem, pass_)
            return
        dtype = getattr(torch, problem.dtype)

        def without_memory(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor:
            dense = MEMORY_FORMAT[problem.layout] if len(shape) == 5 else torch.contiguous_format
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=dense)

        x, weight = without_memory(problem.input_shape), without_memory(problem.weight_shape)
        pooled, code = without_memory(problem.pooled_shape), without_memory(problem.pooled_shape, torch.uint8)
        bias = without_memory((problem.out_channels,)) if problem.bias else None
        tensors: dict[Pass, tuple[list[Tensor | None], list[Tensor | None]]] = {
            "forward": ([x, weight, bias], [pooled, code]),
            "grad_input": ([pooled, code, weight], [x]),
            "grad_weight": ([pooled, code, x], [weight, bias]),
        }
        for launch in self.pooled_launches(problem, pass_, *tensors[pass_]):
            launch.compile()


def pooled_configurations(problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
    """Blocks worth timing for a fused pass on CUDA; of forward, m counts rows of windows, of grad_weight k does."""
    if pass_ == "grad_weight":
        return ("m32n64k64w4s3", "m32n64k64w8s3", "m32n128k64w8s3", "m32n64k128w8s3", "m32n64k32w4s4")
    return ("m128n32k32w4s3", "m128n32k32w8s3", "m256n32k32w8s3", "m64n32k32w4s4", "m128n32k64w8s3")


def share_of_products_needed(problem: ConvProblem, pass_: Pass) -> float:
    """Of those that the kernels of a fused gradient make, which multiply the voxels that were not chosen by zero."""
    if problem.pool is None or pass_ == "forward":
        return 1.0
    made = (
        math.prod(problem.output_size)
        if pass_ == "grad_input"
        else math.prod(problem.pooled_size) * math.prod(problem.pool.window)
    )
    return min(1.0, math.prod(problem.pooled_size) / made)
