"""`cpp.direct`: register-tiled direct convolution in C++ and OpenMP, from csrc/.

The compiled module is loaded at the first question about it. A pass is one call into it: pointers in, the interpreter
lock released, work shared over `torch.get_num_threads()` threads of the OpenMP pool that torch uses. The instruction
set is the fastest that the machine supports, capped by the environment variable PYVOLCONV_ISA (avx512, avx2, baseline).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..host import starts_two_wide_fmas
from ..problem import DTYPE_BYTES, ConvProblem, Layout, Pass
from . import cpp_direct_time
from .base import Accuracy, Backend, empty

if TYPE_CHECKING:
    from types import ModuleType

    from .. import _C

Result = TypeVar("Result")

DTYPES = ("float32", "float64")


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and one line that says why there is none.

    Raises:
        ValueError: PYVOLCONV_ISA names no instruction set of the build; the message lists those that exist.

    Example:
        >>> module, reason = load_extension()
        >>> (module is None) == bool(reason)
        True
    """
    try:
        from .. import _C
    except ImportError as error:
        return None, (
            f"the compiled module pyvolconv._C cannot be imported ({error}); install g++ and then pyvolconv again, "
            "without PYVOLCONV_NO_EXTENSION"
        )
    _C.current_isa()
    return _C, ""


@cache
def kernels() -> ModuleType:
    from .. import _C

    return _C


def call(
    kernel: Callable[..., Result], plan: object, *tensors: Tensor | None, options: tuple[object, ...] = ()
) -> Result:
    """Run a compiled pass on its plan, the options that only some passes have, and the addresses of tensors."""
    # Torch gives the calling Python thread its thread count (omp_set_num_threads) when first asked for it.
    torch.get_num_threads()
    return kernel(plan, *options, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))


def host_reasons(problem: ConvProblem, dtypes: tuple[str, ...]) -> list[str]:
    """Why compiled kernels for these dtypes cannot run a problem, whatever its sizes; empty when they can.

    Example:
        >>> host_reasons(ConvProblem(1, 2, 3, (4, 4, 4), (3, 3, 3), dtype="float16"), ("float32",))
        ['dtype is float16; it computes float32']
    """
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"device is {problem.device}; it runs on cpu")
    if problem.dtype not in dtypes:
        reasons.append(f"dtype is {problem.dtype}; it computes {' and '.join(dtypes)}")
    return reasons


def arithmetic_is_cheap() -> bool:
    """Whether the kernels in use start two FMAs of 64 bytes per cycle, so that everything else weighs more."""
    return bool(kernels().current_isa() == "avx512") and starts_two_wide_fmas()


def plan_of(problem: ConvProblem) -> _C.Plan:
    return _plan(problem, problem.layout, problem.layout)


def mixed_plan_of(problem: ConvProblem, x: Tensor, weight: Tensor) -> _C.Plan:
    """The plan of a forward pass of these operands, which may be contiguous where `problem.layout` is ndhwc."""
    layouts: list[Layout] = [
        "ndhwc" if operand.is_contiguous(memory_format=torch.channels_last_3d) else "ncdhw" for operand in (x, weight)
    ]
    return plan_of(problem) if problem.layout == "ncdhw" else _plan(problem, *layouts)


@lru_cache(maxsize=1024)
def _plan(problem: ConvProblem, source: Layout, weight: Layout) -> _C.Plan:
    from .. import _C

    begin, end = zip(*problem.padding, strict=True)
    return _C.Plan(
        batch=problem.batch,
        in_channels=problem.in_channels,
        out_channels=problem.out_channels,
        input_size=problem.input_size,
        output_size=problem.output_size,
        kernel_size=problem.kernel_size,
        stride=problem.stride,
        padding_begin=begin,
        padding_end=end,
        dilation=problem.dilation,
        groups=problem.groups,
        channels_last=problem.layout == "ndhwc",
        source_channels_last=source == "ndhwc",
        weight_channels_last=weight == "ndhwc",
        double_precision=problem.dtype == "float64",
    )


@lru_cache(maxsize=1024)
def pooled_plan_of(problem: ConvProblem) -> _C.PooledPlan:
    from .. import _C

    if problem.pool is None:
        raise ValueError(f"{problem} has no pool; the fused passes need one")
    return _C.PooledPlan(
        plan_of(problem),
        activation=problem.activation,
        negative_slope=problem.negative_slope,
        window=problem.pool.window,
        stride=problem.pool.stride,
        padding=problem.pool.padding,
        pooled_size=problem.pooled_size,
    )


class PooledForward(Backend):
    """Backends of which one compiled function is the fused forward pass, with codes and without."""

    @abstractmethod
    def _max_pool(self, problem: ConvProblem, *tensors: Tensor | None) -> None:
        """Run it on x, weight, bias, pooled values and codes; without codes where those are None."""

    def forward_max_pool(
        self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pooled, code = empty(problem, "pooled", x), empty(problem, "code", x)
        self._max_pool(problem, x, weight, bias, pooled, code)
        return pooled, code

    def max_pool(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pooled = empty(problem, "pooled", x)
        self._max_pool(problem, x, weight, bias, pooled, None)
        return pooled


class CppDirect(PooledForward):
    """Direct convolution: every problem, both layouts, no reordering of whole tensors.

    With a pool the forward pass keeps what is pooled in the cache, and the gradients are sums over the chosen voxels
    alone.
    """

    name = "cpp.direct"
    family = "cpp"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        _, missing = load_extension()
        return [*host_reasons(problem, DTYPES), *([missing] if missing else [])]

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        call(kernels().forward, plan_of(problem), x, weight, bias, y)
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        call(kernels().grad_input, plan_of(problem), grad_output, weight, result)
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", x)
        call(kernels().grad_weight, plan_of(problem), grad_output, x, result)
        return result

    def _max_pool(self, problem: ConvProblem, *tensors: Tensor | None) -> None:
        call(kernels().forward_max_pool, pooled_plan_of(problem), *tensors)

    def grad_input_max_pool(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad)
        call(kernels().grad_input_max_pool, pooled_plan_of(problem), grad, code, weight, result)
        return result

    def grad_weight_max_pool(
        self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        grad_weight = empty(problem, "weight", x)
        grad_bias = x.new_empty(problem.out_channels) if problem.bias else None
        call(kernels().grad_weight_max_pool, pooled_plan_of(problem), grad, code, x, grad_weight, grad_bias)
        return grad_weight, grad_bias

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        return Accuracy(constant=1.0, accumulate_dtype=problem.dtype, bitwise_reproducible=True)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        lanes = {"avx512": 64, "avx2": 32}.get(kernels().current_isa(), 16) // DTYPE_BYTES[problem.dtype]
        return cpp_direct_time.expected_share(problem, pass_, lanes, arithmetic_is_cheap())
