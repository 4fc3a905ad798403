"""`cpp.widened`: float16 and bfloat16 on the CPU by way of the float32 kernels.

Processors have few instructions for these dtypes, and PyTorch falls to a scalar loop for float16. Here some samples at
a time are widened to float32, computed there, summed there, and rounded once at the end. The copies stay within
`COPIED_BYTES`, half of a last-level cache, unless a single sample is larger, or the gradient of a weight so large that
adding up the sums of several parts would cost more than memory does.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

from torch import Tensor

from ..precision import Precision, get_precision
from ..problem import DTYPE_BYTES, ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .cpp import CppDirect
from .cpp_winograd import CppWinograd

DTYPES = ("float16", "bfloat16")
COPIED_BYTES = 8 << 20
COPIED_BYTES_PER_WEIGHT = 300
"""Twice the partial sums of Winograd's weight gradient: 16 splits of 64 points for 27 taps."""
CONVERTING = 40
"""FLOPs at peak in the time that it takes to convert a value, measured."""


class CppWidened(Backend):
    """Whichever of `cpp.direct` and `cpp.winograd` expects to be faster in float32, on converted operands."""

    name = "cpp.widened"
    family = "cpp"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        reasons = CppDirect().unsupported_reasons(problem.with_(dtype="float32"), pass_)
        if problem.dtype not in DTYPES:
            reasons.append(f"dtype is {problem.dtype}; it converts {' and '.join(DTYPES)}")
        if problem.pool is not None:
            reasons.append("has no pass fused with a pool")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        backend, wide_weight = _inner(problem, "forward", get_precision()), weight.float()
        wide_bias = None if bias is None else bias.float()
        for begin, part in _parts(problem, "forward"):
            end = begin + part.batch
            y[begin:end].copy_(backend.forward(part, x[begin:end].float(), wide_weight, wide_bias))
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        backend, wide_weight = _inner(problem, "grad_input", get_precision()), weight.float()
        for begin, part in _parts(problem, "grad_input"):
            end = begin + part.batch
            result[begin:end].copy_(backend.grad_input(part, grad_output[begin:end].float(), wide_weight))
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        backend = _inner(problem, "grad_weight", get_precision())
        total: Tensor | None = None
        for begin, part in _parts(problem, "grad_weight"):
            end = begin + part.batch
            share = backend.grad_weight(part, grad_output[begin:end].float(), x[begin:end].float())
            total = share if total is None else total.add_(share)
        assert total is not None
        return empty(problem, "weight", x).copy_(total)

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        return _inner(problem, pass_, get_precision()).accuracy(problem.with_(dtype="float32"), pass_)

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """That of the float32 kernel, and the time to convert each value."""
        inner = _inner(problem, pass_, get_precision()).expected_efficiency(problem.with_(dtype="float32"), pass_)
        values = problem.min_bytes(pass_) / DTYPE_BYTES[problem.dtype]
        return 1 / (1 / inner + CONVERTING * values / problem.flops(pass_))


@lru_cache(maxsize=4096)
def _inner(problem: ConvProblem, pass_: Pass, precision: Precision) -> Backend:
    """The float32 backend; `precision` is what `CppWinograd` looks at."""
    wide = problem.with_(dtype="float32")
    able = [backend for backend in (CppDirect(), CppWinograd()) if not backend.unsupported_reasons(wide, pass_)]
    return max(able, key=lambda backend: backend.expected_efficiency(wide, pass_))


@lru_cache(maxsize=1024)
def _parts(problem: ConvProblem, pass_: Pass) -> list[tuple[int, ConvProblem]]:
    """First sample and float32 problem of each part of the batch, which are as even as can be."""
    sample = 4 * (math.prod(problem.input_shape[1:]) + math.prod(problem.output_shape[1:]))
    most = COPIED_BYTES
    if pass_ == "grad_weight":
        most = max(most, COPIED_BYTES_PER_WEIGHT * math.prod(problem.weight_shape))
    parts = -(-problem.batch // max(1, min(problem.batch, most // sample)))
    cuts = [problem.batch * part // parts for part in range(parts + 1)]
    wide = problem.with_(dtype="float32")
    return [(begin, wide.with_(batch=end - begin)) for begin, end in itertools.pairwise(cuts)]
