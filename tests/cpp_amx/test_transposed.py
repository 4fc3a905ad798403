"""`cpp.amx`: all residues of a stride in one task, and the bias of a transposed convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyvolconv
from pyvolconv.problem import LAYOUTS, ConvProblem

from .units import same_bits

TRANSPOSED = (
    "n2ic3oc32-i9x10x34-k3-s2-p1+0",  # three channels: all residues are columns of one product
    "n1ic4oc5-i6x5x8-k4x3x2-s2",  # residues with other numbers of taps
    "n1ic16oc40-i8x9x37-k3-s2-p1",  # a product for each residue; the last voxels have no second residue
    "n1ic40oc9-i6-k2-s2",  # windows that touch, two blocks of columns
    "n2ic5oc7-i5x9x11-k3x1x3-s3x2x1-p1x0x1",  # residues without a tap
    "n1ic33oc700-i3x4x6-k3-s2-p1",  # chunks of source channels
    "n1ic3oc2900-i4x5x6-k3-s2-p1",
    "n1ic2oc3-i1x1x2-k3-s2-p1",  # fewer voxels than residues
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", TRANSPOSED)
def test_residues(text, layout, unit, parts, operands, run_pass, reference, assert_within_bound, threads, poisoned):
    problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
    args = operands(problem, "grad_input", integers=True)
    threads(1)
    assert torch.equal(run_pass(unit, problem, "grad_input", args).double(), reference(problem, "grad_input", args))
    args = operands(problem, "grad_input")
    got = run_pass(unit, problem, "grad_input", args)
    assert_within_bound(got, problem, "grad_input", args, unit.accuracy(problem, "grad_input"))
    threads(2)
    assert same_bits(run_pass(unit, problem, "grad_input", args), got)
    bias = torch.randn(problem.in_channels)
    expected = got.double() + bias.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(unit.transposed(problem, *args, bias).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("text", ["n2ic3oc4-i5x6x7-k3-p1", "n2ic3oc4-i5x6x7-k3-s2-p1", "n2ic3oc4-i9-k1-s3x3x2"])
@pytest.mark.parametrize("value", [1.0, torch.nan], ids=["splits", "does not"])
def test_bias_is_that_of_a_later_addition(value, text, dtype, layout, unit, operands):
    """To the bit: in one task or a task for each residue, in what is rounded to 16 bits, and where others compute."""
    problem = ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}")
    x, weight = operands(problem, "grad_input")
    x[-1, -1, -1, -1, -1] = value
    bias = torch.randn(problem.in_channels).to(x.dtype)
    expected = unit.grad_input(problem, x, weight).add_(bias.view(-1, 1, 1, 1))
    torch.testing.assert_close(unit.transposed(problem, x, weight, bias), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("forced", ["cpp.direct", "cpp.amx", "cpp.winograd", "aten"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_of_a_transposed_convolution(forced, layout, own):
    if forced == own.name and own.unsupported_reasons(ConvProblem(1, 1, 1, (3, 3, 3), (3, 3, 3)), "forward"):
        pytest.skip("no matrix unit")
    memory_format = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}[layout]
    x = torch.randn(2, 6, 5, 6, 7).to(memory_format=memory_format)
    weight, bias = torch.randn(6, 4, 3, 3, 3).to(memory_format=memory_format), torch.randn(4)
    with pyvolconv.use_backend(forced):
        got = pyvolconv.conv_transpose3d(x, weight, bias, stride=2, padding=1, output_padding=1)
    expected = F.conv_transpose3d(x.double(), weight.double(), bias.double(), stride=2, padding=1, output_padding=1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
