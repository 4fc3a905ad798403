"""The passes fused with a max-pool in Triton: exact on integers as torch's, in the interpreter or on a GPU.

As in test_triton the blocks are as small as they can be, so that small problems have many of them. test_fused_passes
runs other problems within the error bound, between guards.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import pyvolconv
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.triton_implicit_gemm import TritonImplicitGemm
from pyvolconv.dispatch import choose
from pyvolconv.epilogue import KEEPS_PREACTIVATION, NO_VOXEL
from pyvolconv.fused_voxels import scatter, select
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

from .cpp_fused.checks import (
    activate,
    check_integers,
    dense_in,
    expected,
    pooled,
    random_code,
    random_grad,
    with_bias,
)
from .cpp_fused.kernels import Fused
from .cpp_fused.problems import parse, plain
from .fused_operator.calls import ours, theirs
from .hopper import compile_on

pytest.importorskip("triton")

BACKEND = TritonImplicitGemm()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY_BLOCKS = (
    "n1ic1oc18-i3x4x5-k2x3x3-p1-bias-relu-pool2",  # (tap, channel) in several blocks; odd sizes
    "n1ic16oc17-i2x3x6-k3x1x2-p1x0x0-bias-relu-pool2ceil",  # blocks of channels with one tap; windows at an end
    "n1g2ic34oc6-i3x4x5-k1x2x3-s1x2x1-p0x1x2-leaky_relu(0.25)-pool1x2x2",
    "n1ic3oc5-i4x3x5-k2x1x3-p0x0x1-bias-relu-pool3s2p1",  # windows overlap, and have 27 voxels
    "n2ic2oc3-i5x5x4-k2-s2x1x1-p1+0x0x0+1-d1x2x1-pool2x1x3s1x2x1p1x0x1ceil",
    "n1ic2oc3-i6x5x5-k2-bias-leaky_relu(0.0)-pool2s3",  # voxels that no window sees
    "n1g3ic3oc3-i4x4x6-k3-p1-relu-pool1",
    "n1ic2oc2-i4x5x8-k2x4x5-p1x2x2-relu-pool2",  # more taps than a word has bits
    "n3ic2oc20-i2x2x2-k3-p1-bias-relu-pool2",  # one window in each sample
)
LAYERS = (
    "n2ic1oc16-i5x6x8-k3-p1-bias-relu-pool2",
    "n2ic16oc24-i3x5x6-k3-p1-bias-relu-pool2",
    "n1ic24oc32-i4x4x5-k3-p1-bias-relu-pool2ceil",
)


class PooledFused(Fused):
    """The fused passes of the backend, of CPU tensors, with blocks of any size."""

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = None if bias is None else bias.to(DEVICE)
        value, code = BACKEND.forward_max_pool(problem.with_(device=DEVICE), x.to(DEVICE), weight.to(DEVICE), bias)
        return value.cpu(), code.cpu()

    def grad_input(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        operands = [tensor.to(DEVICE) for tensor in (grad, code, weight)]
        return BACKEND.grad_input_max_pool(problem.with_(device=DEVICE), *operands).cpu()

    def grad_weight(self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        operands = [tensor.to(DEVICE) for tensor in (grad, code, x)]
        of_weight, of_bias = BACKEND.grad_weight_max_pool(problem.with_(device=DEVICE, bias=True), *operands)
        assert of_bias is not None
        return of_weight.cpu(), of_bias.cpu()


@pytest.fixture
def fused(require):
    require(BACKEND, parse(LAYERS[0], "ncdhw").with_(device=DEVICE), "forward")
    return PooledFused()


@pytest.fixture
def small_blocks(monkeypatch):
    from pyvolconv.kernels import triton_common, triton_pooled_forward, triton_pooled_grad_input
    from pyvolconv.kernels import triton_pooled_grad_weight as grad_weight

    monkeypatch.setattr(triton_common, "LARGEST_BLOCKS", {2: (32, 16, 16), 4: (32, 16, 16)})
    monkeypatch.setattr(triton_pooled_forward, "LEAST_POOLED", 1)
    monkeypatch.setattr(triton_pooled_grad_input, "FLAT_ALWAYS", False)
    for name, value in {"LARGEST_VOXELS": 64, "LARGEST_COLUMNS": 16, "MIN_STEPS": 1, "PARTIALS": 16}.items():
        monkeypatch.setattr(grad_weight, name, value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", MANY_BLOCKS)
def test_exact_on_integers_in_many_blocks(fused, small_blocks, poisoned, operands, reference, text, layout):
    check_integers(fused, parse(text, layout), operands, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", LAYERS)
def test_exact_on_integers(fused, poisoned, operands, reference, text, layout):
    check_integers(fused, parse(text, layout), operands, reference)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_keeps_the_preactivation_of_the_chosen_voxel(fused, poisoned, operands, reference, activation):
    check_integers(fused, parse(f"n1ic2oc3-i5x5x6-k2-bias-{activation}-pool2ceil", "ndhwc"), operands, reference)


def test_offsets_of_64_bits(fused, monkeypatch, operands, reference):
    """The same results by the arithmetic of large samples."""
    from pyvolconv.kernels import triton_pooled_forward, triton_pooled_grad_input, triton_pooled_grad_weight

    for module in (triton_pooled_forward, triton_pooled_grad_input, triton_pooled_grad_weight):
        monkeypatch.setattr(module, "needs_long_offsets", lambda *tensors: True)
    for layout in LAYOUTS:
        check_integers(fused, parse("n2g2ic4oc6-i4x1x5-k2x1x3-p1x0x1-relu-pool2x1x2", layout), operands, reference)


def test_a_sample_of_more_than_2_to_the_31_values(fused):
    """Memory that nobody touches does not exist: strides of the convolution leave 27 voxels to look at."""
    if DEVICE == "cuda":
        pytest.skip("in the interpreter only, a GPU would have to hold all 13 GB")
    side = 33000
    problem = parse(f"n1ic1oc2-i3x{side}x{side}-k1-s1x{side // 2}x{side // 2}-pool3x1x2", "ncdhw")
    x = torch.empty(problem.input_shape)
    assert x.numel() > 2**31
    voxels = x[:, :, :, :: side // 2, :: side // 2]
    voxels.copy_(torch.randint(-3, 4, voxels.shape))
    weight = torch.tensor([1.0, -2.0]).view(problem.weight_shape)
    value, code = fused.forward(problem, x, weight, None)
    want_value, want_code = expected(problem, voxels * weight.view(2, 1, 1, 1))
    assert torch.equal(value, want_value)
    assert torch.equal(code, want_code)
    grad = random_grad(problem, integers=True)
    of_weight, _ = fused.grad_weight(problem, grad, code, x)
    dense = scatter(grad, code, problem.output_size, problem.pool)
    assert torch.equal(of_weight.flatten(), (dense * voxels).sum((0, 2, 3, 4)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["none-pool2", "relu-pool2ceil", "leaky_relu(0.25)-pool3s2p1", "relu-pool1x2x3"])
def test_ties_nan_and_infinities_resolve_as_torch(fused, layout, text):
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
    # One channel at a time: zero times an infinity of another channel is NaN.
    problem = parse(f"n2g3ic3oc3-i3x5x7-k1-bias-{text}", layout)
    weight = dense_in(problem, torch.ones(problem.weight_shape))
    for share, bias in ((0.0, -20.0), (0.3, 0.0), (1.0, 0.0)):
        x = torch.randn(problem.input_shape).round()
        chosen = specials[torch.randint(len(specials), x.shape)]
        x = dense_in(problem, torch.where(torch.rand(x.shape) < share, chosen, x))
        value, code = fused.forward(problem, x, weight, torch.full((3,), bias))
        # Contiguous: torch 2.13 names a voxel of another window where all of a channels-last one are -infinity.
        want_value, want_code = expected(problem, (x + bias).contiguous())
        assert torch.equal(value.nan_to_num(nan=1e30), want_value.nan_to_num(nan=1e30))
        assert torch.equal(code, want_code)


def test_windows_that_chose_no_voxel_count_as_zero(fused):
    """Whatever stands there; and NaN elsewhere reaches its own values only."""
    for layout in LAYOUTS:
        problem = parse("n1ic3oc5-i4x6x8-k3-p1-relu-pool2", layout)
        weight, x = (dense_in(problem, torch.randn(shape)) for shape in (problem.weight_shape, problem.input_shape))
        grad, code = torch.full(problem.pooled_shape, float("nan")), torch.full(problem.pooled_shape, NO_VOXEL)
        grad, code = dense_in(problem, grad), dense_in(problem, code.to(torch.uint8))
        assert not fused.grad_input(problem, grad, code, weight).any()
        assert not any(result.any() for result in fused.grad_weight(problem, grad, code, x))
        code[0, 4, 1, 1, 2] = 5
        hit = fused.grad_input(problem, grad, code, weight).isnan()
        assert hit[0, :, 2:4, 1:4, 4:7].all()
        assert hit.sum() == 3 * 2 * 3 * 3
        for hit in (result.isnan() for result in fused.grad_weight(problem, grad, code, x)):
            assert hit[4].all()
            assert hit.sum() == hit[4].numel()


@pytest.mark.parametrize("text", ["n2ic3oc5-i4x6x5-k3-p1-bias-relu-pool2", "n1ic20oc4-i4x5x6-k2-gelu-pool3s2p1"])
@pytest.mark.parametrize(("dtype", "layout"), [("float16", "ncdhw"), ("bfloat16", "ndhwc")])
def test_half_precision_keeps_float32_sums(
    fused, poisoned, operands, reference, magnitude, assert_within_bound, text, dtype, layout
):
    problem = parse(text, layout, dtype)
    accuracy = BACKEND.accuracy(problem, "forward")
    assert accuracy.accumulate_dtype == "float32"
    args = operands(plain(problem), "forward")
    value, code = fused.forward(problem, *with_bias(args))
    exact = reference(plain(problem), "forward", args)
    bound = magnitude(plain(problem), "forward", [arg.abs() for arg in args], (0, 0, 0))
    bound = accuracy.constant * torch.finfo(torch.float32).eps * problem.reduction_length("forward") * bound
    bound += torch.finfo(value.dtype).eps * exact.abs()
    found = value.double() if problem.activation in KEEPS_PREACTIVATION else value.double().masked_fill(code == 255, 0)
    assert bool(((found - select(exact, code, problem.pool)).abs() <= select(bound, code, problem.pool)).all())
    # No other voxel is better by more than rounding, of the sum and of its activation.
    best, _ = pooled(problem, activate(problem, exact))
    slack = 2 * pooled(problem, 1.13 * bound + torch.finfo(value.dtype).eps * exact.abs())[0]
    assert bool((activate(problem, found) >= best - slack).all())

    (weight, x), grad, code = (operands(plain(problem), "forward")[:2])[::-1], random_grad(problem, False), None
    code = random_code(problem)
    if problem.pool.overlap == 1:  # else the dense gradient, rounded to this dtype, is another one
        dense = scatter(grad, code, problem.output_size, problem.pool)
        of_input = fused.grad_input(problem, grad, code, weight)
        assert of_input.dtype == getattr(torch, dtype)
        assert_within_bound(of_input, plain(problem), "grad_input", [dense, weight], accuracy)
        of_weight, of_bias = fused.grad_weight(problem, grad, code, x)
        assert_within_bound(of_weight, plain(problem), "grad_weight", [dense, x], accuracy)
        total = dense.double().sum((0, 2, 3, 4))
        assert torch.allclose(of_bias.double(), total, rtol=torch.finfo(of_bias.dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    ("epilogue", "shift"), [("pool2ceil", 2048.0), ("silu-pool2", -21.0), ("leaky_relu(0.9)-pool1", -2048.0)]
)
def test_values_are_rounded_before_they_compete(fused, epilogue, shift):
    """As torch's passes one by one: 2,049 is 2,048 in float16, and silu of -21 and of -22 are both zero."""
    problem = parse(f"n2ic1oc1-i5x6x9-k1-bias-{epilogue}", "ncdhw", "float16")
    x, weight = torch.randint(-3, 4, problem.input_shape).half(), torch.ones(problem.weight_shape).half()
    value, code = fused.forward(problem, x, weight, torch.tensor([shift]).half())
    want_value, want_code = expected(problem, x + shift)
    assert torch.equal(value, want_value)
    assert torch.equal(code, want_code)


def test_the_gradient_of_the_bias_is_summed_in_float32(fused):
    """2,049 and more ones: neither a sum in float16 nor in its 10 fraction bits holds them."""
    problem = parse("n2ic1oc17-i4x40x60-k1-bias-relu-pool2", "ncdhw")
    grad, code = torch.ones(problem.pooled_shape), torch.zeros(problem.pooled_shape, dtype=torch.uint8)
    grad[0, 0, 0, 0, 0] = 1 + 2.0**-12  # not a number of TF32
    _, of_bias = fused.grad_weight(problem, grad, code, torch.ones(problem.input_shape))
    assert torch.equal(of_bias.double(), grad.double().sum((0, 2, 3, 4)).float().double())


def test_partial_sums_are_split_by_the_problem_and_added_in_order(fused, small_blocks, operands, reference):
    from pyvolconv.kernels.triton_pooled_grad_weight import grad_weight

    problem = parse("n2ic2oc3-i7x9x22-k2-bias-relu-pool2", "ndhwc")
    grad, code = random_grad(problem, integers=True), random_code(problem)
    _, x = operands(plain(problem), "grad_weight", integers=True)
    sizes = (problem.stride, (0, 0, 0), problem.dilation, 1, problem.pool.window, problem.pool.stride, (0, 0, 0))
    results = x.new_empty(problem.weight_shape), x.new_empty(3)
    multiply, add = grad_weight(grad, code, x, *sizes, problem.output_size, *results, channels_last=True)
    assert add.arguments["splits"] == multiply.arguments["splits"] > 16  # more than are added at once
    dense = scatter(grad, code, problem.output_size, problem.pool)
    of_weight, of_bias = fused.grad_weight(problem, grad, code, x)
    assert torch.equal(of_weight.double(), reference(plain(problem), "grad_weight", [dense, x]))
    assert torch.equal(of_bias, dense.sum((0, 2, 3, 4)))
    grad = random_grad(problem, integers=False)
    first, again = (fused.grad_weight(problem, grad, code, x) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize(("activation", "pool"), [("relu", "2ceil"), ("silu", "3s2p1"), ("leaky_relu", "1x2x2")])
def test_derivatives_of_the_operator_are_torchs(fused, activation, pool):
    """First and second derivatives under `use_backend("triton")`, of both layouts."""
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x, w = torch.randn(1, 4, 3, 5, 4), torch.randn(6, 2, 2, 3, 2)
        args = [tensor.to(DEVICE).contiguous(memory_format=layout) for tensor in (x, w)]
        args = [tensor.requires_grad_() for tensor in (*args, torch.randn(6, device=DEVICE))]
        results = []
        for function in (ours(activation, pool), theirs(activation, pool)):
            leaves = args if function is not None else []
            with pyvolconv.use_backend("triton"):
                y = function(*leaves)
                cotangent = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
                first = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
                second = torch.autograd.grad(sum((part**2).sum() for part in first), leaves[:2])
            results.append((y, *first, *second))
        tolerance = {"rtol": 1e-2, "atol": 5e-2} if DEVICE == "cuda" else {"rtol": 1e-4, "atol": 1e-4}
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, **tolerance)


def test_the_family_runs_fused_passes_here(fused):
    with pyvolconv.use_backend("triton"):
        for pass_, text in itertools.product(PASSES, LAYERS):
            assert choose(parse(text, "ncdhw").with_(device=DEVICE), pass_).name == BACKEND.name


def test_without_codes_the_values_are_the_same(fused, operands):
    problem = parse(LAYERS[0], "ndhwc").with_(device=DEVICE)
    args = [arg.to(DEVICE) for arg in operands(plain(problem), "forward")]
    value, _ = BACKEND.forward_max_pool(problem, *args)
    alone = BACKEND.max_pool(problem, *args)
    assert torch.equal(alone, value)
    assert alone.is_contiguous(memory_format=MEMORY_FORMAT["ndhwc"])


COMPILE = """
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.triton_implicit_gemm import TritonImplicitGemm
from pyvolconv.kernels import triton_common
from pyvolconv.problem import PASSES, ConvProblem

triton_common.Launch.compile = lambda launch: print(
    launch.kernel.__name__, (code := compiled(launch)).metadata.shared, "mma" in code.asm["ptx"], len(code.asm["cubin"])
)
for text in sys.argv[1:]:
    problem = ConvProblem.parse(text)
    for pass_ in PASSES:
        ways = TritonImplicitGemm().configurations(problem, pass_)[:2] if text == sys.argv[1] else ()
        for configuration in ("", *ways):
            TritonImplicitGemm().configured(configuration).prepare(problem, pass_)
"""

HOPPER = (
    "cuda-float32-ncdhw-n32ic24oc32-i8x8x15-k3-p1-bias-relu-pool2",
    "cuda-float32-ndhwc-n32ic1oc16-i29x30x60-k3-p1-bias-relu-pool2",
    "cuda-float16-ncdhw-n32ic16oc24-i15x15x30-k3-p1-bias-gelu-pool2",
    "cuda-bfloat16-ndhwc-n2g2ic6oc10-i9x10x11-k5-s2x1x1-p2-leaky_relu-pool3s2p1",
)


@pytest.mark.slow
def test_configurations_compile_for_hopper_without_a_gpu(tmp_path):
    """Products on tensor cores, and no more shared memory than a multiprocessor has."""
    lines = compile_on(COMPILE, HOPPER, tmp_path)
    kernels = ["forward_max_pool_kernel", "grad_input_max_pool_kernel", "grad_weight_max_pool_kernel"]
    assert {name for name, *_ in lines} == {*kernels, "add_weight_and_bias_kernel"}
    ways = sum(len(BACKEND.configurations(ConvProblem.parse(HOPPER[0]), pass_)[:2]) for pass_ in PASSES)
    assert sum(name in kernels for name, *_ in lines) == ways + len(HOPPER) * len(PASSES)
    for name, shared_bytes, on_tensor_cores, code_bytes in lines:
        assert int(shared_bytes) <= 227 * 1024, name
        assert int(code_bytes) > 0
        assert name not in kernels or on_tensor_cores == "True"
