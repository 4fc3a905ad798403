"""Every scheme of cpp.winograd by its outputs per tile, the problems that each runs on, and what it may be off by."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.base import MEMORY_FORMAT, Accuracy
from pyvolconv.backends.cpp import load_extension, plan_of
from pyvolconv.backends.cpp_winograd import SCHEMES, STRIDED_SCHEMES
from pyvolconv.problem import ConvProblem

_C, missing = load_extension()
needs_extension = pytest.mark.skipif(_C is None, reason=missing or "compiled")

ALL = [(kernel, outputs) for kernel, allowed in SCHEMES.items() for outputs in allowed["high"]]
STRIDED = [(kernel, stride, outputs) for (kernel, stride), outputs in STRIDED_SCHEMES.items()]
ONE = (1, 1, 1)
BLOCKED = [
    *((kernel, ONE, ONE, schemes["default"][0]) for kernel, schemes in SCHEMES.items()),
    ((3, 3, 3), ONE, (1, 2, 1), (2, 2, 2)),
    *((kernel, stride, ONE, outputs) for kernel, stride, outputs in STRIDED),
]
"""Kernel, stride, dilation and outputs of a tile."""
SHAPES = (
    "n1ic1oc1-i1x1x1",
    "n2ic16oc24-i5x6x7",
    "n1ic5oc33-i2x9x4",
    "n3ic17oc8-i7x3x11",
    "n1ic24oc100-i4x4x8",  # more than one block of channels, whole tiles
    "n1ic40oc16-i9x10x37",  # several boxes
)
CONSTANT = {0: 2.0, 1: 2.0, 2: 8.0, 3: 32.0}
"""By axes of F(4): what `CppWinograd.accuracy` declares."""


def problem_of(shape, kernel, dtype, layout, padding=None, dilation=(1, 1, 1), stride=(1, 1, 1)):
    dilation = tuple(d if k > 1 else 1 for k, d in zip(kernel, dilation, strict=True))
    padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True)) if padding is None else padding
    kernel, stride, padding, dilation = ("x".join(map(str, each)) for each in (kernel, stride, padding, dilation))
    return ConvProblem.parse(f"cpu-{dtype}-{layout}-{shape}-k{kernel}-s{stride}-p{padding}-d{dilation}")


def run(problem, outputs, pass_, args):
    shape = {"forward": problem.output_shape, "grad_input": problem.input_shape, "grad_weight": problem.weight_shape}[
        pass_
    ]
    result = torch.full(shape, float("nan"), dtype=args[0].dtype).contiguous(
        memory_format=MEMORY_FORMAT[problem.layout]
    )
    if pass_ == "forward":
        bias = args[2].data_ptr() if problem.bias else 0
        _C.winograd_forward(plan_of(problem), outputs, args[0].data_ptr(), args[1].data_ptr(), bias, result.data_ptr())
    else:
        kernel = {"grad_input": _C.winograd_grad_input, "grad_weight": _C.winograd_grad_weight}[pass_]
        kernel(plan_of(problem), outputs, args[0].data_ptr(), args[1].data_ptr(), result.data_ptr())
    return result


def accuracy_of(outputs, dtype, dilation=(1, 1, 1), stride=(1, 1, 1)):
    mixed = tuple(0 if m == 1 else m + 1 if s == 1 else 2 for m, s in zip(outputs, stride, strict=True))
    reach = tuple(m * d for m, d in zip(mixed, dilation, strict=True))
    return Accuracy(CONSTANT[outputs.count(4)], dtype, True, reach)


def tile(outputs, stride, pass_):
    return tuple(m * s for m, s in zip(outputs, stride, strict=True)) if pass_ == "grad_input" else outputs
