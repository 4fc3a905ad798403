"""What torch's float64 convolution and max_pool3d give for a fused pass, and the comparison of integers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.epilogue import KEEPS_PREACTIVATION, NO_VOXEL, MaxPool
from pyvolconv.fused_ops import APPLY
from pyvolconv.fused_voxels import code_of_indices, scatter, select
from pyvolconv.problem import ConvProblem

from .kernels import Fused
from .problems import plain


def activate(problem: ConvProblem, value: Tensor) -> Tensor:
    return APPLY[problem.activation](value, problem.negative_slope)


def pooled(problem: ConvProblem, value: Tensor) -> tuple[Tensor, Tensor]:
    pool: MaxPool = problem.pool
    return F.max_pool3d_with_indices(value, pool.window, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def expected(problem: ConvProblem, dense: Tensor) -> tuple[Tensor, Tensor]:
    """(value, code) that the forward pass returns for these convolution results."""
    value, indices = pooled(problem, activate(problem, dense))
    code = code_of_indices(indices, problem.output_size, problem.pool)
    if problem.activation == "relu":
        code[value <= 0] = NO_VOXEL
    return select(dense, code, problem.pool) if problem.activation in KEEPS_PREACTIVATION else value, code


def dense_in(problem: ConvProblem, tensor: Tensor) -> Tensor:
    dtype = tensor.dtype if tensor.dtype == torch.uint8 else getattr(torch, problem.dtype)
    return tensor.to(dtype).contiguous(memory_format=MEMORY_FORMAT[problem.layout])


def with_bias(args: list[Tensor]) -> list[Tensor | None]:
    return [*args, *[None] * (3 - len(args))]


def random_code(problem: ConvProblem) -> Tensor:
    """Codes of random maxima, which lie inside the output; a tenth chose no voxel."""
    _, indices = pooled(problem, torch.randn(problem.output_shape))
    code = code_of_indices(indices, problem.output_size, problem.pool)
    code[torch.rand(code.shape) < 0.1] = NO_VOXEL
    return dense_in(problem, code)


def random_grad(problem: ConvProblem, integers: bool) -> Tensor:
    grad = torch.randint(-3, 4, problem.pooled_shape) if integers else torch.randn(problem.pooled_shape)
    return dense_in(problem, grad)


def check_integers(fused: Fused, problem: ConvProblem, operands, reference) -> None:
    args = operands(plain(problem), "forward", integers=True)
    value, code = fused.forward(problem, *with_bias(args))
    dense = reference(plain(problem), "forward", args)
    if problem.activation in ("gelu", "gelu_tanh", "silu"):
        # Rounding decides which values tie: the choice must be a best one, and the value what lies there.
        assert torch.equal(value.double(), select(dense, code, problem.pool))
        best, _ = pooled(problem, activate(problem, dense))
        assert torch.allclose(activate(problem, value.double()), best, atol=1e-6, rtol=1e-6)
    else:
        want_value, want_code = expected(problem, dense)
        assert torch.equal(value.double(), want_value)
        assert torch.equal(code, want_code)
    check_integer_gradients(fused, problem, code, operands, reference)


def check_integer_gradients(fused: Fused, problem: ConvProblem, code: Tensor, operands, reference) -> None:
    _, weight = operands(plain(problem), "grad_input", integers=True)
    _, x = operands(plain(problem), "grad_weight", integers=True)
    grad = random_grad(problem, integers=True)
    dense = scatter(grad, code, problem.output_size, problem.pool)
    assert torch.equal(
        fused.grad_input(problem, grad, code, weight).double(), reference(plain(problem), "grad_input", [dense, weight])
    )
    of_weight, of_bias = fused.grad_weight(problem, grad, code, x)
    assert torch.equal(of_weight.double(), reference(plain(problem), "grad_weight", [dense, x]))
    assert torch.equal(of_bias.double(), dense.double().sum((0, 2, 3, 4)))
