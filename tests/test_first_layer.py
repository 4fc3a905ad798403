"""What is specific to cpp.first_layer: sizes that cut tiles, strips and slabs, pooling in registers, values that do not
mix. Every instruction set; `test_backends` and `test_fused_passes` have the rest."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.cpp import load_extension, plan_of, pooled_plan_of
from pyvolconv.backends.cpp_first_layer import CppFirstLayer
from pyvolconv.epilogue import NO_VOXEL
from pyvolconv.problem import LAYOUTS, ConvProblem

_C, missing = load_extension()
pytestmark = pytest.mark.skipif(_C is None, reason=missing or "compiled")

BACKEND = CppFirstLayer()
SHAPES = (
    "n2ic1oc16-i9x10x11-k3-p1",
    "n1ic1oc1-i1x1x1-k3-p1",
    "n1ic3oc20-i5x7x70-k3-p2x0x1",  # several strips, a part of a vector of channels
    "n2ic4oc5-i4x5x6-k3-p1+0x1x3+2",  # another padding at each end
    "n1ic2oc40-i6x5x33-k3-p0+2x3+0x1",
    "n1ic3oc17-i2x3x4-k3-p4",  # tiles that see nothing but padding
    "n1ic1oc16-i80x61x64-k3-p1",  # several slabs of one sample
)


def problems(dtypes=("float32", "float64"), shapes=SHAPES):
    for shape, dtype, layout in itertools.product(shapes, dtypes, LAYOUTS):
        yield ConvProblem.parse(f"cpu-{dtype}-{layout}-{shape}-bias")


def pooled_problems(activation):
    epilogue = "" if activation == "none" else f"-{activation}"
    for problem, ceil in itertools.product(problems(), ("", "ceil")):
        if min(problem.output_size) >= 2:
            yield ConvProblem.parse(f"{problem}{epilogue}-pool2{ceil}")


def direct(problem, x, weight, bias):
    """cpp.direct's forward, which infinities and NaN pass as the definition says."""
    y = torch.empty(problem.output_shape, dtype=x.dtype).contiguous(memory_format=MEMORY_FORMAT[problem.layout])
    _C.forward(plan_of(problem), x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr())
    return y


def spoil(tensor, count=4):
    values = torch.tensor([float("inf"), -float("inf"), float("nan")]).repeat(count)
    for place, value in zip(torch.randperm(tensor.numel())[:count].tolist(), values, strict=False):
        tensor[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))] = value


@pytest.mark.parametrize("shape", SHAPES)
def test_within_bound_and_same_bits(shape, operands, assert_within_bound, threads, use_isa):
    for problem in problems(shapes=[shape]):
        args = operands(problem, "forward")
        for isa in _C.supported_isas():
            use_isa(isa)
            threads(1)
            got = BACKEND.forward(problem, *args)
            assert_within_bound(got, problem, "forward", args, BACKEND.accuracy(problem, "forward"))
            threads(3)
            assert torch.equal(BACKEND.forward(problem, *args), got), f"other bits with 3 threads and {isa}"


def test_exact_on_integers(isa, operands, reference):
    for problem in problems():
        args = operands(problem, "forward", integers=True)
        assert torch.equal(BACKEND.forward(problem, *args).double(), reference(problem, "forward", args))


@pytest.mark.parametrize("activation", ["relu", "none", "leaky_relu(0.25)"])
def test_values_and_codes_are_those_of_torch(isa, activation, operands):
    """Small integers are exact and tie often: of equal values the first is chosen, of partial windows what exists."""
    for problem in pooled_problems(activation):
        plain = problem.with_(activation="none", negative_slope=0.01, pool=None)
        args = operands(plain, "forward", integers=True)
        value, code = BACKEND.forward_max_pool(problem, *args)
        dense = BACKEND.forward(plain, *args)
        dense = {"relu": F.relu, "none": lambda y: y}.get(activation, lambda y: F.leaky_relu(y, 0.25))(dense)
        expected, indices = F.max_pool3d(dense.contiguous(), 2, ceil_mode=problem.pool.ceil_mode, return_indices=True)
        assert torch.equal(value, expected)
        _, height, width = problem.output_size
        d, h, w = indices // (height * width), indices // width % height, indices % width
        places = d % 2 * 4 + h % 2 * 2 + w % 2
        if activation == "relu":
            places[expected <= 0] = NO_VOXEL
        assert torch.equal(code.long(), places)


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_infinity_and_nan_reach_only_what_depends_on_them(isa, where, operands):
    for problem in problems():
        args = operands(problem, "forward")
        spoil(args[("x", "weight", "bias").index(where)])
        got, expected = BACKEND.forward(problem, *args), direct(problem, *args)
        assert torch.equal(got.isnan(), expected.isnan())
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_infinity_and_nan_are_pooled_as_in_torch(isa, activation, operands):
    for problem in pooled_problems(activation):
        plain = problem.with_(activation="none", pool=None)
        args = operands(plain, "forward", integers=True)
        spoil(args[0])
        value, _ = BACKEND.forward_max_pool(problem, *args)
        dense = direct(plain, *args)
        expected = F.max_pool3d(F.relu(dense) if activation == "relu" else dense, 2, ceil_mode=problem.pool.ceil_mode)
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def test_no_overflow_that_the_convolution_does_not_have(isa):
    """Transforms add what the convolution subtracts: near the end of the range a slab is computed directly."""
    for problem in problems(dtypes=("float32",)):
        x = torch.full(problem.input_shape, 1.5e38).contiguous(memory_format=MEMORY_FORMAT[problem.layout])
        weight = torch.zeros(problem.weight_shape).contiguous(memory_format=MEMORY_FORMAT[problem.layout])
        weight[:, 0, 1, 1, 1] = 1
        bias = torch.zeros(problem.out_channels)
        assert torch.equal(BACKEND.forward(problem, x, weight, bias), direct(problem, x, weight, bias))
        weight[:, 0, 1, 1, 1], bias[:] = 3e38, 3e38
        x.fill_(0.1)
        got = BACKEND.forward(problem, x, weight, bias)
        torch.testing.assert_close(got, direct(problem, x, weight, bias), rtol=1e-6, atol=0)
        # Small weights: it is the sums of source values that would overflow.
        x.fill_(1e38)
        weight[:, 0, 1, 1, 1], bias[:] = 1e-4, 0
        assert torch.equal(BACKEND.forward(problem, x, weight, bias), direct(problem, x, weight, bias))


def test_large_values_that_fit_are_exact(isa):
    """Just inside of the limit the transforms are used, and nothing overflows."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc16-i6x6x8-k3-p1-bias")
    x = torch.full(problem.input_shape, 2.0**120).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.ones(problem.weight_shape).contiguous(memory_format=torch.channels_last_3d)
    args = (x, weight, torch.zeros(16))
    assert torch.equal(BACKEND.forward(problem, *args), direct(problem, *args))


def direct_grad_weight(problem, grad_output, x):
    """cpp.direct's grad_weight."""
    result = torch.empty(problem.weight_shape, dtype=x.dtype).contiguous(memory_format=MEMORY_FORMAT[problem.layout])
    _C.grad_weight(plan_of(problem), grad_output.data_ptr(), x.data_ptr(), result.data_ptr())
    return result


def test_grad_weight_within_bound_and_same_bits(isa, operands, assert_within_bound, threads):
    for problem in problems():
        args = operands(problem, "grad_weight")
        threads(1)
        got = BACKEND.grad_weight(problem, *args)
        assert_within_bound(got, problem, "grad_weight", args, BACKEND.accuracy(problem, "grad_weight"))
        threads(3)
        assert torch.equal(BACKEND.grad_weight(problem, *args), got)


def test_grad_weight_is_exact_on_integers(isa, operands, reference):
    for problem in problems():
        args = operands(problem, "grad_weight", integers=True)
        assert torch.equal(BACKEND.grad_weight(problem, *args).double(), reference(problem, "grad_weight", args))


@pytest.mark.parametrize("where", ["grad_output", "x"])
def test_infinity_and_nan_reach_only_the_taps_that_depend_on_them(isa, where, operands):
    for problem in problems():
        args = operands(problem, "grad_weight")
        spoil(args[("grad_output", "x").index(where)], 1)
        got, expected = BACKEND.grad_weight(problem, *args), direct_grad_weight(problem, *args)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        args[1].fill_(1.5e38)  # only the transforms overflow
        args[0].fill_(0)
        assert torch.equal(BACKEND.grad_weight(problem, *args), torch.zeros(problem.weight_shape, dtype=args[0].dtype))


@pytest.mark.slow
def test_large_results_are_written_past_the_caches(isa, operands, reference):
    """32 MiB and more of whole vectors in ndhwc; also the ends of odd sizes."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc16-i63x91x97-k3-p1-bias")
    args = operands(problem, "forward", integers=True)
    assert torch.equal(BACKEND.forward(problem, *args).double(), reference(problem, "forward", args))


def test_kernels_refuse_what_does_not_fit():
    strided = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc8-i6x6x8-k3-s2-p1")
    with pytest.raises(ValueError, match="need 3x3x3 taps, stride 1 and one group"):
        _C.first_layer_forward(plan_of(strided), 0, 0, 0, 0)
    with pytest.raises(ValueError, match="need 3x3x3 taps, stride 1 and one group"):
        _C.first_layer_grad_weight(plan_of(strided), 0, 0, 0)
    many = ConvProblem.parse("cpu-float32-ndhwc-n1ic5oc8-i6x6x8-k3-p1")
    with pytest.raises(ValueError, match="needs 1 to 4 channels"):
        _C.first_layer_grad_weight(plan_of(many), 0, 0, 0)
    with pytest.raises(ValueError, match="needs 1 to 4 channels in one group"):
        _C.first_layer_grad_input(plan_of(many), 0, 0, 0)
    pooled = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc8-i6x6x8-k3-p1-relu-pool3")
    with pytest.raises(ValueError, match="windows of 2x2x2 with stride 2"):
        _C.first_layer_forward_max_pool(pooled_plan_of(pooled), 0, 0, 0, 0, 0)


def test_refusals_name_the_reason():
    refusals = {
        "ic5oc8-i8-k3-p1": "input channels are 5",
        "g2ic2oc8-i8-k3-p1": "input channels are 2 in 2 groups",
        "ic1oc8-i8-k5-p2": "kernel size is",
        "ic1oc8-i8-k3-s2-p1": "stride is",
        "ic1oc8-i8-k3-p2-d2": "dilation",
        "ic1oc8-i8-k3-p1-relu-pool3": "pool is 3",
        "ic1oc8-i8-k3-p1-relu-pool2s1": "pool is 2s1",
    }
    for text, reason in refusals.items():
        problem = ConvProblem.parse(f"cpu-float32-ndhwc-n1{text}")
        assert any(reason in each for each in BACKEND.unsupported_reasons(problem, "forward")), text
    plain = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc8-i8-k3-p1")
    assert BACKEND.unsupported_reasons(plain, "forward") == []
    assert BACKEND.unsupported_reasons(plain, "grad_weight") == []
    pooled = ConvProblem.parse("cpu-float32-ndhwc-n1ic1oc8-i8-k3-p1-relu-pool2")
    assert BACKEND.unsupported_reasons(pooled, "grad_weight") == ["it has no grad_weight fused with a pool"]
    assert BACKEND.unsupported_reasons(pooled, "grad_input") == ["it has no grad_input fused with a pool"]
    assert BACKEND.unsupported_reasons(plain, "grad_input") == []
    strided = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i16-k5-s2-d2")
    assert BACKEND.unsupported_reasons(strided, "grad_input") == []
    many = ConvProblem.parse("cpu-float32-ndhwc-n1ic5oc8-i8-k3")
    assert any("input channels are 5" in each for each in BACKEND.unsupported_reasons(many, "grad_input"))
