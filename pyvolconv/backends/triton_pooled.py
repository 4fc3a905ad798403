"""`triton.pooled`: convolution, activation and max-pool as one implicit GEMM in Triton, with its gradients.

Takes any pool, dtypes and devices of `triton`, which has the plain passes. What is pooled, and its gradient, exist in
registers only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..problem import ConvProblem, Pass
from .base import empty
from .triton import TritonBackend, _device_of, _geometry, _multiplication


class TritonPooled(TritonBackend):
    """The passes fused with a max-pool; float32 sums, bitwise reproducible, and no gradient of what was pooled."""

    name: ClassVar[str] = "triton.pooled"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = super().unsupported_reasons(problem, pass_)
        if problem.pool is None:
            reasons.append("has only passes fused with a pool")
        return reasons

    def forward_max_pool(
        self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pooled, code = empty(problem, "pooled", x), empty(problem, "code", x)
        self._forward(problem, x, weight, bias, pooled, code)
        return pooled, code

    def max_pool(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pooled = empty(problem, "pooled", x)
        self._forward(problem, x, weight, bias, pooled, None)
        return pooled

    def _forward(
        self,
        problem: ConvProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pooled: Tensor,
        code: Tensor | None,
    ) -> None:
        from ..kernels.triton_pooled_forward import forward

        epilogue = (problem.activation, problem.negative_slope, *_pool(problem))
        launch = forward(x, weight, bias, *_geometry(problem), *epilogue, pooled, code, **_options(problem))
        with _device_of(pooled):
            launch.run()

    def grad_input_max_pool(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        from ..kernels.triton_pooled_grad_input import grad_input

        grad_x = empty(problem, "input", grad)
        launch = grad_input(grad, code, weight, *_geometry(problem), *_pool(problem), grad_x, **_options(problem))
        with _device_of(grad_x):
            launch.run()
        return grad_x

    def grad_weight_max_pool(
        self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        from ..kernels.triton_pooled_grad_weight import grad_weight

        grad_w = empty(problem, "weight", x)
        grad_b = x.new_empty(problem.out_channels) if problem.bias else None
        sizes = (*_geometry(problem), *_pool(problem))
        launches = grad_weight(grad, code, x, *sizes, grad_w, grad_b, **_options(problem))
        with _device_of(grad_w):
            for launch in launches:
                launch.run()
        return grad_w, grad_b


def _pool(problem: ConvProblem) -> tuple[tuple[int, int, int], ...]:
    """Window, stride and padding of the pool, and the size of what is pooled."""
    if problem.pool is None:
        raise ValueError(f"{problem} has no pool; the fused passes need one")
    return problem.pool.window, problem.pool.stride, problem.pool.padding, problem.output_size


def _options(problem: ConvProblem) -> dict[str, Any]:
    return {"channels_last": problem.layout == "ndhwc", **_multiplication(problem)}
