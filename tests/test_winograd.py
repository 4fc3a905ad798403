"""Every scheme of cpp.winograd, called by its outputs per tile: sizes that cut tiles and boxes, values that do not mix.

The backend chooses among these schemes by cost; here each runs on every shape, on every instruction set.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from pyvolconv import get_precision, set_precision
from pyvolconv.backends.base import MEMORY_FORMAT, Accuracy
from pyvolconv.backends.cpp import load_extension, plan_of, pooled_plan_of
from pyvolconv.backends.cpp_winograd import SCHEMES, STRIDED_SCHEMES, CppWinograd
from pyvolconv.epilogue import NO_VOXEL
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

from .closeness import assert_close

_C, missing = load_extension()
pytestmark = pytest.mark.skipif(_C is None, reason=missing or "compiled")

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


@pytest.mark.parametrize(("kernel", "outputs"), ALL)
def test_within_bound_and_same_bits(kernel, outputs, pass_, operands, assert_within_bound, threads, use_isa):
    if pass_ == "grad_weight" and 4 in outputs:
        with pytest.raises(ValueError, match="one or two outputs per tile"):
            run(problem_of(SHAPES[0], kernel, "float32", "ndhwc"), outputs, pass_, [torch.zeros(1), torch.zeros(1)])
        return
    for shape, dtype, layout in itertools.product(SHAPES, ("float32", "float64"), LAYOUTS):
        problem = problem_of(shape, kernel, dtype, layout)
        args = operands(problem, pass_)
        for isa in _C.supported_isas():
            use_isa(isa)
            threads(1)
            got = run(problem, outputs, pass_, args)
            assert_within_bound(got, problem, pass_, args, accuracy_of(outputs, dtype))
            threads(3)
            assert torch.equal(run(problem, outputs, pass_, args), got), f"other bits with 3 threads and {isa}"


@pytest.mark.parametrize(("kernel", "stride", "dilation", "outputs"), BLOCKED)
def test_blocks_of_channels_and_boxes_of_several_samples(
    kernel, stride, dilation, outputs, operands, reference, threads, use_isa
):
    """Blocks of 64 or 32 by 128 or 64 channels, the last ones narrower; with many, boxes hold more than one sample."""
    shapes = ("n2ic70oc150-i4x4x6", "n5ic65oc12-i3x6x4", "n3ic7oc131-i4x3x5", "n7ic280oc260-i2x3x3")
    for shape, dtype, layout in itertools.product(shapes, ("float32", "float64"), LAYOUTS):
        problem = problem_of(shape, kernel, dtype, layout, dilation=dilation, stride=stride)
        args = operands(problem, "grad_weight", integers=True)
        exact = reference(problem, "grad_weight", args)
        for isa, count in itertools.product(_C.supported_isas(), (1, 3)):
            use_isa(isa)
            threads(count)
            got = run(problem, outputs, "grad_weight", args)
            assert torch.equal(got.double(), exact), (shape, dtype, layout, isa, count)


@pytest.mark.parametrize("padding", [(0, 0, 0), (2, 0, 1), (3, 4, 2)])
def test_paddings(isa, padding, operands, assert_within_bound):
    for outputs, pass_ in itertools.product(((2, 2, 2), (2, 2, 4)), PASSES):
        if pass_ == "grad_weight" and 4 in outputs:
            continue
        problem = problem_of("n1ic8oc16-i4x5x9", (3, 3, 3), "float32", "ndhwc", padding)
        args = operands(problem, pass_)
        assert_within_bound(run(problem, outputs, pass_, args), problem, pass_, args, accuracy_of(outputs, "float32"))


@pytest.mark.parametrize(("kernel", "outputs"), ALL)
@pytest.mark.parametrize("dilation", [(2, 2, 2), (3, 1, 2), (5, 12, 4)])
def test_dilation(isa, kernel, outputs, dilation, pass_, operands, assert_within_bound, threads):
    """Residues with several boxes, with parts of tiles, with one voxel and with none."""
    if pass_ == "grad_weight" and 4 in outputs:
        return
    lattice = (1, 1, 1) if pass_ == "grad_weight" else dilation  # taps are next to each other
    for shape, dtype, layout in (
        ("n2ic16oc24-i5x6x7", "float32", "ndhwc"),
        ("n1ic5oc33-i9x7x30", "float32", "ncdhw"),
        ("n1ic17oc8-i12x3x11", "float64", "ndhwc"),
    ):
        problem = problem_of(shape, kernel, dtype, layout, dilation=dilation)
        args = operands(problem, pass_)
        threads(1)
        got = run(problem, outputs, pass_, args)
        assert_within_bound(got, problem, pass_, args, accuracy_of(outputs, dtype, lattice))
        threads(3)
        assert torch.equal(run(problem, outputs, pass_, args), got)


@pytest.mark.parametrize("padding", ["0", "4x1x2", "3+0x0+5x7+2"])
def test_exact_on_integers_with_dilation(isa, padding, operands, reference):
    for dilation, pass_, layout in itertools.product(("2", "3x1x4"), PASSES, LAYOUTS):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-n2ic5oc20-i9x8x13-k3-p{padding}-d{dilation}")
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, (2, 2, 2), pass_, args).double(), reference(problem, pass_, args))


def tile(outputs, stride, pass_):
    return tuple(m * s for m, s in zip(outputs, stride, strict=True)) if pass_ == "grad_input" else outputs


@pytest.mark.parametrize(("kernel", "stride", "outputs"), STRIDED)
def test_strides(isa, kernel, stride, outputs, pass_, operands, assert_within_bound, threads):
    for shape, dtype, layout in itertools.product(SHAPES, ("float32", "float64"), LAYOUTS):
        problem = problem_of(shape, kernel, dtype, layout, stride=stride)
        args = operands(problem, pass_)
        threads(1)
        got = run(problem, tile(outputs, stride, pass_), pass_, args)
        assert_within_bound(got, problem, pass_, args, accuracy_of(outputs, dtype, stride=stride))
        threads(3)
        assert torch.equal(run(problem, tile(outputs, stride, pass_), pass_, args), got)


@pytest.mark.parametrize(("kernel", "stride", "outputs"), STRIDED)
def test_strides_are_exact_on_integers(isa, kernel, stride, outputs, operands, reference):
    """All constants are 1 or -1. Paddings of one side, wider than the kernel; also with dilation."""
    kernel, step = ("x".join(map(str, each)) for each in (kernel, stride))
    depth = "0" if outputs[0] == 1 else "3+1"
    paddings = (
        f"p{depth}x1x1",
        f"p{depth}x1+4x3+0",
        f"p{depth}x5x1+2",
        "p0",
        f"p{depth}x4x0+3",
        f"p{depth}x2x3-d1x2x3",
    )
    for padding, pass_, layout in itertools.product(paddings, PASSES, LAYOUTS):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-n2ic5oc20-i9x10x15-k{kernel}-s{step}-{padding}")
        if pass_ == "grad_input" and any(
            s == 2 and p % 2 == 0 for s, (p, _) in zip(stride, problem.padding, strict=True)
        ):
            continue
        args = operands(problem, pass_, integers=True)
        got = run(problem, tile(outputs, stride, pass_), pass_, args)
        assert torch.equal(got.double(), reference(problem, pass_, args))


@pytest.mark.parametrize(("kernel", "stride", "outputs"), STRIDED)
def test_infinity_and_nan_in_a_strided_gradient(isa, kernel, stride, outputs, operands):
    problem = problem_of("n1ic17oc6-i9x8x13", kernel, "float32", "ndhwc", stride=stride)
    grad_output, weight = operands(problem, "grad_input")
    for hit, values in ((grad_output, (float("inf"), float("nan"), 3e38)), (weight, (-float("inf"), float("nan")))):
        for value in values:
            place = tuple(int(torch.randint(size, ())) for size in hit.shape)
            kept = hit[place].clone()
            hit[place] = value
            direct = torch.empty(problem.input_shape).contiguous(memory_format=torch.channels_last_3d)
            _C.grad_input(plan_of(problem), grad_output.data_ptr(), weight.data_ptr(), direct.data_ptr())
            got = run(problem, tile(outputs, stride, "grad_input"), "grad_input", [grad_output, weight])
            torch.testing.assert_close(got, direct, rtol=1e-3, atol=1e-3, equal_nan=True)
            hit[place] = kept


def test_boxes_larger_than_caches(isa, operands, reference):
    """With weights beyond a core's cache boxes of tiles are, too."""
    for layout, pass_ in (("ndhwc", "forward"), ("ncdhw", "grad_input")):
        problem = problem_of("n1ic160oc160-i8x40x40", (3, 3, 3), "float64", layout)
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, (2, 2, 2), pass_, args), reference(problem, pass_, args))


@pytest.mark.parametrize("outputs", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_exact_on_integers(isa, outputs, operands, reference):
    """The constants of F(2, 3) are powers of two."""
    kernel = tuple(1 if m == 1 else 3 for m in outputs)
    for shape, pass_, layout in itertools.product(SHAPES, PASSES, LAYOUTS):
        problem = problem_of(shape, kernel, "float32", layout)
        args = operands(problem, pass_, integers=True)
        assert torch.equal(run(problem, outputs, pass_, args).double(), reference(problem, pass_, args))


@pytest.mark.parametrize(
    ("kernel", "outputs", "dilation", "stride"),
    [(kernel, outputs, dilation, (1, 1, 1)) for kernel, outputs in ALL for dilation in ((1, 1, 1), (2, 1, 3))]
    + [(kernel, outputs, (1, 1, 1), stride) for kernel, stride, outputs in STRIDED],
)
@pytest.mark.parametrize("where", ["source", "weight"])
def test_infinity_and_nan_reach_only_what_depends_on_them(isa, kernel, outputs, dilation, stride, where, operands):
    """The same voxels are infinite, negative infinite and NaN as in the direct convolution of the same values."""
    problem = problem_of("n1ic6oc17-i7x8x13", kernel, "float32", "ndhwc", dilation=dilation, stride=stride)
    x, weight = operands(problem, "forward")
    hit = x if where == "source" else weight
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    places = torch.randperm(hit.numel())[:5]
    for place, value in zip(places.tolist(), values.repeat(2), strict=False):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), hit.shape))
        hit[index] = value
    direct = torch.empty(problem.output_shape).contiguous(memory_format=torch.channels_last_3d)
    _C.forward(plan_of(problem), x.data_ptr(), weight.data_ptr(), 0, direct.data_ptr())
    got = run(problem, outputs, "forward", [x, weight])
    assert not direct.isfinite().all()
    assert torch.equal(got.isnan(), direct.isnan())
    torch.testing.assert_close(got, direct, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("outputs", "stride"),
    [((2, 2, 2), (1, 1, 1)), ((1, 2, 2), (1, 1, 1)), ((2, 1, 1), (1, 1, 1)), ((2, 2, 2), (2, 2, 2))],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_weight_gradient_that_is_not_finite_is_the_direct_one(isa, outputs, stride, value, operands):
    """3e38: sums of the transforms overflow, the gradient itself does not."""
    kernel = tuple(1 if m == 1 else 3 for m in outputs)
    for layout, hit in itertools.product(LAYOUTS, (0, 1)):
        shape = "n1ic6oc17-i7x8x13" if stride == (1, 1, 1) else "n1ic6oc17-i13x16x25"
        problem = problem_of(shape, kernel, "float32", layout, stride=stride)
        args = operands(problem, "grad_weight")
        if value == 3e38:
            args[1 - hit].zero_()
            args[1 - hit][0, 1, 3, 4, 5] = 1e-3
            args[hit].fill_(value)
        else:
            args[hit][0, 1, 0, 4, 6] = value
        direct = torch.empty(problem.weight_shape).contiguous(memory_format=MEMORY_FORMAT[layout])
        _C.grad_weight(plan_of(problem), args[0].data_ptr(), args[1].data_ptr(), direct.data_ptr())
        assert torch.equal(direct.isfinite().all(), torch.tensor(value == 3e38))
        assert torch.equal(run(problem, outputs, "grad_weight", args).nan_to_num(nan=7.0), direct.nan_to_num(nan=7.0))


def test_no_overflow_that_the_convolution_does_not_have(isa, operands):
    """Transforms add what the convolution subtracts; a tile that overflows in between is computed directly."""
    problem = problem_of("n1ic4oc8-i6x6x8", (3, 3, 3), "float32", "ndhwc")
    x, weight = operands(problem, "forward")
    x.fill_(1.5e38)
    weight.fill_(0)
    weight[:, 0, 1, 1, 1] = 1
    for outputs in SCHEMES[3, 3, 3]["high"]:
        assert torch.equal(run(problem, outputs, "forward", [x, weight]), torch.full(problem.output_shape, 1.5e38))


@pytest.mark.parametrize(
    ("outputs", "stride"), [(outputs, 1) for outputs in SCHEMES[3, 3, 3]["high"]] + [((2, 2, 2), 2)]
)
def test_pool_chooses_among_the_same_sums(isa, outputs, stride):
    """Fused with a pool the sums have the same bits as without: values and codes are those of torch's max_pool3d."""
    for shape, layout in itertools.product(("n2ic16oc24-i5x7x9", "n1ic3oc40-i8x4x16"), LAYOUTS):
        problem = ConvProblem.parse(f"cpu-float32-{layout}-{shape}-k3-s{stride}-p1-bias-relu-pool2ceil")
        plain = problem.with_(activation="none", pool=None)
        x, weight = (
            torch.randn(s).contiguous(memory_format=MEMORY_FORMAT[layout])
            for s in (problem.input_shape, problem.weight_shape)
        )
        bias = torch.randn(problem.out_channels)
        dense = run(plain, outputs, "forward", [x, weight, bias]).relu()
        expected = torch.nn.functional.max_pool3d(dense, 2, ceil_mode=True)
        pooled, code = (
            torch.empty(problem.pooled_shape, dtype=dtype).contiguous(memory_format=MEMORY_FORMAT[layout])
            for dtype in (torch.float32, torch.uint8)
        )
        addresses = [t.data_ptr() for t in (x, weight, bias, pooled, code)]
        _C.winograd_forward_max_pool(pooled_plan_of(problem), outputs, *addresses)
        assert torch.equal(pooled, expected)
        pooled.fill_(float("nan"))
        _C.winograd_forward_max_pool(pooled_plan_of(problem), outputs, *addresses[:4], 0)
        assert torch.equal(pooled, expected), "without codes"
        assert torch.equal(code == NO_VOXEL, expected == 0)
        code[code == NO_VOXEL] = 0  # a window of zeros
        d, h, w = (torch.arange(size) for size in problem.pooled_size)
        at = (
            ((2 * d[:, None, None] + code // 4) * dense.shape[3] + 2 * h[:, None] + code // 2 % 2) * dense.shape[4]
            + 2 * w
            + code % 2
        )
        assert torch.equal(dense.flatten(2).gather(2, at.flatten(2)).view_as(pooled), pooled)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("outputs", SCHEMES[3, 3, 3]["default"])
def test_pooled_values_with_biases_that_are_not_finite(isa, outputs, activation):
    """With codes and without: torch's maximum of NaN is NaN, and a ReLU keeps it."""
    epilogue = "" if activation == "none" else f"-{activation}"
    problem = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc24-i5x7x9-k3-p1-bias{epilogue}-pool2ceil")
    x, weight = (
        torch.randn(s).contiguous(memory_format=MEMORY_FORMAT["ndhwc"])
        for s in (problem.input_shape, problem.weight_shape)
    )
    bias = torch.randn(24)
    bias[3], bias[4], bias[20] = float("nan"), float("inf"), -float("inf")
    dense = torch.nn.functional.conv3d(x, weight, bias, padding=1)
    expected = torch.nn.functional.max_pool3d(dense.relu() if epilogue else dense, 2, ceil_mode=True)
    pooled, code = (
        torch.empty(problem.pooled_shape, dtype=dtype).contiguous(memory_format=MEMORY_FORMAT["ndhwc"])
        for dtype in (torch.float32, torch.uint8)
    )
    for address in (code.data_ptr(), 0):
        pooled.fill_(7)
        _C.winograd_forward_max_pool(
            pooled_plan_of(problem), outputs, *(t.data_ptr() for t in (x, weight, bias, pooled)), address
        )
        assert_close(pooled, expected, equal_nan=True)


def test_scheme_that_does_not_fit_is_refused():
    problem = problem_of("n1ic4oc8-i6x6x8", (3, 3, 3), "float32", "ndhwc")
    for outputs in ((2, 2, 3), (1, 2, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
            _C.winograd_forward(plan_of(problem), outputs, 0, 0, 0, 0)
    strided = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-s2x2x3-p1")
    with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
        _C.winograd_forward(plan_of(strided), (2, 2, 2), 0, 0, 0, 0)
    for text in ("s2-p1", "s2-p2", "s2-p2-d3"):
        strided = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-{text}")
        with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
            _C.winograd_forward(plan_of(strided), (4, 4, 4), 0, 0, 0, 0)
        with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
            _C.winograd_grad_input(plan_of(strided), (2, 2, 2) if text == "s2-p1" else (4, 4, 4), 0, 0, 0)
    pooled = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-p1-relu-pool3")
    with pytest.raises(ValueError, match="windows of the pool do not fit"):
        _C.winograd_forward_max_pool(pooled_plan_of(pooled), (2, 2, 2), 0, 0, 0, 0, 0)
    dilated = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-p2-d2-relu-pool2")
    with pytest.raises(ValueError, match="windows of the pool do not fit"):
        _C.winograd_forward_max_pool(pooled_plan_of(dilated), (2, 2, 2), 0, 0, 0, 0, 0)


def test_precision_allows_schemes_that_round_more():
    problem = problem_of("n2ic64oc64-i32", (3, 3, 3), "float32", "ndhwc")
    backend = CppWinograd()
    assert get_precision() == "default"
    usual = backend.accuracy(problem, "forward")
    try:
        set_precision("high")
        faster = backend.accuracy(problem, "forward")
        assert faster.constant > usual.constant
        assert not faster.exact_integers
    finally:
        set_precision("default")
    assert backend.accuracy(problem, "forward") == usual
    with pytest.raises(ValueError, match="precision='low' is unknown; expected 'default' or 'high'"):
        set_precision("low")
    assert get_precision() == "default"


def test_refusals_name_the_reason():
    backend = CppWinograd()
    refusals = {
        "k5-p2": "kernel size is",
        "k3-s2x1x2-p1": "it computes (1, 1, 1), (2, 2, 2), (1, 2, 2)",
        "k3x1x1-s2x1x1-p1x0x0": "it computes (1, 1, 1)",
        "k3-p2-d2-relu-pool2": "dilation",
        "k3-p1-relu-pool3": "windows must touch",
    }
    for text, reason in refusals.items():
        problem = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc8-i8-{text}")
        assert any(reason in each for each in backend.unsupported_reasons(problem, "forward")), text
    plain = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i8-k3-p1")
    assert backend.unsupported_reasons(plain, "forward") == []
    assert backend.unsupported_reasons(plain, "grad_weight") == []
    for text in ("k3-s2-p2", "k3-s2-p1-d2"):
        strided = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc8-i8-{text}")
        assert backend.unsupported_reasons(strided, "forward") == []
        assert "an odd padding" in backend.unsupported_reasons(strided, "grad_input")[0]
    pooled = plain.with_(
        activation="relu", pool=ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i8-k3-p1-relu-pool2").pool
    )
    assert backend.unsupported_reasons(pooled, "grad_weight") == ["it has no grad_weight fused with a pool"]
