"""`cpp.bfloat16`: direct convolution by dot products of bfloat16 pairs (vdpbf16ps), from csrc/.

An instruction multiplies two source channels at a time, so the peak is twice that of float32 FMAs; products are exact,
sums are float32, and numbers below float32's smallest normal one count as zero. float32 problems run here only where
`torch.backends.mkldnn.conv.fp32_precision` is "bf16": their operands are rounded to bfloat16, their results are not.
"""

from __future__ import annotations

from torch import Tensor

from ..precision import convolves_float32_in_bfloat16
from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .cpp import arithmetic_is_cheap, call, kernels, load_extension, plan_of
from .linear_time import used_share

LANES = 16

ROUNDING_OPERANDS = 2.0**16
"""Two operands, each rounded by less than 2**-8 of itself, in steps of float32's eps."""


class CppBfloat16(Backend):
    """Forward and grad_input of any window, stride and dilation, both layouts; one group."""

    name = "cpp.bfloat16"
    family = "cpp"

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        _, missing = load_extension()
        if missing:
            return [missing]
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"device is {problem.device}; it runs on cpu")
        if problem.dtype not in ("bfloat16", "float32"):
            reasons.append(f"dtype is {problem.dtype}; it computes bfloat16")
        elif problem.dtype == "float32" and not convolves_float32_in_bfloat16():
            reasons.append('dtype is float32 and torch.backends.mkldnn.conv.fp32_precision is not "bf16"')
        if pass_ == "grad_weight":
            reasons.append("it has no grad_weight")
        if problem.groups != 1:
            reasons.append(f"it has {problem.groups} groups; it needs one")
        if problem.pool is not None:
            reasons.append("has no pass fused with a pool")
        if not kernels().has_bfloat16():
            reasons.append(f"instruction set {kernels().current_isa()} of this processor has no vdpbf16ps")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        call(kernels().bfloat16_forward, plan_of(problem), x, weight, bias, y, options=(problem.dtype == "float32",))
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad_output)
        options = (problem.dtype == "float32",)
        call(kernels().bfloat16_grad_input, plan_of(problem), grad_output, weight, result, options=options)
        return result

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.name} has no grad_weight: {problem}")

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        rounding = ROUNDING_OPERANDS / problem.reduction_length(pass_) if problem.dtype == "float32" else 0.0
        return Accuracy(
            constant=1.0 + rounding, accumulate_dtype="float32", bitwise_reproducible=True, exact_integers=not rounding
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Share of lanes in use times what was measured: 1.75 of the FMA peak in ndhwc, 1.6 in ncdhw, less where
        strides or dilation break rows into pieces; with the time of 12 FLOPs for every byte to be moved. Where two wide
        FMAs start per cycle, dot products do not: 0.4.
        """
        sources, targets = problem.in_channels, problem.out_channels
        if pass_ == "grad_input":
            sources, targets = targets, sources
        used = used_share(targets, LANES) * used_share(sources, 2)
        whole_rows = problem.stride == problem.dilation == (1, 1, 1)
        reached = (1.75 if whole_rows else 1.6) if problem.layout == "ndhwc" else 1.6 if whole_rows else 1.0
        if arithmetic_is_cheap():
            reached = 0.4
        return 1 / (1 / (reached * used) + 12 * problem.min_bytes(pass_) / problem.flops(pass_))
