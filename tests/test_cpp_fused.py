"""cpp.direct's fused passes (convolution, activation, max-pool) over the shapes at which their blocking changes.

Codes, ties and NaN are compared with torch's max_pool3d of the float64 convolution. Every problem runs with the kernels
of each instruction set of this machine and, built here by the local compiler, with 64-byte vectors.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pyvolconv.backends.base import MEMORY_FORMAT, empty
from pyvolconv.backends.cpp import load_extension
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.epilogue import ACTIVATIONS, KEEPS_PREACTIVATION, MaxPool
from pyvolconv.fused_ops import APPLY
from pyvolconv.fused_voxels import code_of_indices, scatter, select
from pyvolconv.problem import LAYOUTS, ConvProblem

CPP = next(backend for backend in REGISTRY if backend.name == "cpp.direct")
CSRC = Path(__file__).parent.parent / "csrc"
EXTENSION, MISSING = load_extension()
ISAS = EXTENSION.supported_isas() if EXTENSION else []
WIDE = "64-byte vectors"

CUT = (
    # The three layers of the mission's network, and its ceil_mode: windows of 1 and 2 voxels at every end.
    "n2ic1oc16-i9x10x21-k3-p1-bias-relu-pool2ceil",
    "n2ic16oc24-i7x5x15-k3-p1-bias-relu-pool2ceil",
    "n1ic24oc32-i4x5x9-k3-p1-bias-relu-pool2",
    # Channels around whole vectors; the planar kernel's blocks of 1 to 4; rows around whole vectors of windows.
    *(f"n1ic3oc{channels}-i4x5x11-k3-p1-bias-relu-pool2" for channels in (1, 2, 3, 7, 8, 9, 17, 33)),
    *(f"n1ic2oc3-i2x4x{width}-k3-p1-relu-pool2ceil" for width in (1, 2, 3, 15, 16, 17, 31, 32, 33, 70)),
    # Few input channels, at which a vector holds more than one tap.
    *(f"n2ic{channels}oc12-i6x7x10-k3-p1-relu-pool2" for channels in (1, 2, 3, 4, 5)),
    # Segments of several vectors and pieces; several chunks of source channels.
    *(f"n1ic{channels}oc5-i4x4x6-k3-p1-relu-pool2" for channels in (11, 40, 70)),
    "n2ic300oc20-i2x3x4-k3-p1-bias-relu-pool2ceil",
    "n1ic70oc140-i3x4x5-k3-p1-bias-none-pool2",
    # Windows that overlap, leave gaps, are padded, are flat or hold many voxels.
    "n2ic4oc9-i9x10x11-k3-p1-bias-relu-pool3s2p1",
    "n1ic4oc9-i9x10x31-k3-p1-bias-relu-pool3s2ceil",
    "n1ic5oc8-i5x6x19-k3-p1-leaky_relu(0.25)-pool2s1",
    "n1ic4oc9-i9x10x21-k3-p1-bias-relu-pool2s3",
    "n2ic4oc9-i5x9x16-k3-p1-relu-pool1x2x2",
    "n2ic4oc9-i5x6x21-k3-p1-silu-pool1x3x4s2x1x5p0x1x2",
    "n1ic3oc8-i8x8x9-k3-p1-relu-pool6x6x7",
    "n1ic4oc9-i5x6x7-k3-p1-bias-gelu-pool1",
    "n1ic4oc9-i2x2x3-k3-p1-bias-leaky_relu(0.0)-pool2s2p1ceil",
    # Strides, dilation, groups, depthwise, one-sided padding; input that nothing reads.
    "n1ic3oc16-i17x18x19-k7-s2-p3-bias-relu-pool3s2p1",
    "n1ic6oc9-i9x11x37-k1x2x2-s3x3x4-relu-pool2ceil",
    "n1ic4oc8-i9x10x21-k3-p2-d2-relu-pool2",
    "n1ic9oc8-i9x10x21-k2x3x2-s2x1x3-p1x2x3-d2x2x4-gelu_tanh-pool2",
    "n2g3ic9oc51-i3x4x6-k3-p1-bias-relu-pool2",
    *(f"n1g{groups}ic{groups}oc{groups}-i4x5x11-k3-p1-bias-relu-pool2" for groups in (2, 8, 70)),
    "n2ic4oc8-i5x6x7-k4x2x2-p1+2x0+1x0+1-bias-relu-pool2",
    "n1ic3oc4-i2x3x4-k2-p5+0x0+6x7+3-bias-relu-pool2",
    # Volumes of several tiles and slabs.
    "n1ic32oc8-i21x23x19-k3-p1-bias-relu-pool2ceil",
    "n1ic2oc16-i19x20x210-k3-p1-relu-pool2",
)


def parse(text: str, layout: str, dtype: str = "float32") -> ConvProblem:
    return ConvProblem.parse(f"cpu-{dtype}-{layout}-{text.replace('-none', '')}")


def numbers(problem: ConvProblem) -> list[int]:
    """A problem as tests/cpp_fused_harness.cpp reads it."""
    begin, end = zip(*problem.padding, strict=True)
    head = [problem.batch, problem.in_channels, problem.out_channels, problem.groups, int(problem.layout == "ndhwc")]
    sizes = (problem.input_size, problem.output_size, problem.kernel_size, problem.stride)
    assert problem.pool is not None
    pool = (problem.pool.window, problem.pool.stride, problem.pool.padding, problem.pooled_size)
    triples = itertools.chain(*sizes, begin, end, problem.dilation, *pool)
    return [*head, ACTIVATIONS.index(problem.activation), *triples]


def compile_harness(target: Path, *flags: str) -> None:
    sources = [Path(__file__).parent / "cpp_fused_harness.cpp"]
    sources += [CSRC / name for name in ("isa_kernels.cpp", "arena.cpp", "parallel.cpp")]
    command = ["g++", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi", f"-I{CSRC}", *flags]
    built = subprocess.run([*command, *map(str, sources), "-o", str(target)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


class Fused:
    """The three fused passes of the extension, as `pyvolconv.ops` calls them."""

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return CPP.forward_max_pool(problem, x, weight, bias)

    def grad_input(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        return CPP.grad_input_max_pool(problem, grad, code, weight)

    def grad_weight(self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor) -> Tensor:
        return CPP.grad_weight_max_pool(problem, grad, code, x)


class WideFused(Fused):
    """The same, of a library of tests/cpp_fused_harness.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _run(self, problem: ConvProblem, pass_: int, *tensors: Tensor | None) -> None:
        torch.get_num_threads()
        self.library.run_pass(
            (ctypes.c_int64 * 39)(*numbers(problem)),
            ctypes.c_double(problem.negative_slope),
            int(problem.dtype == "float64"),
            pass_,
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        )

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        value, code = empty(problem, "pooled", x), empty(problem, "code", x)
        self._run(problem, 0, x, weight, bias, value, code)
        return value, code

    def grad_input(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        result = empty(problem, "input", grad)
        self._run(problem, 1, grad, weight, None, result, code)
        return result

    def grad_weight(self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", grad)
        self._run(problem, 2, grad, x, None, result, code)
        return result


@pytest.fixture(scope="session")
def wide_library(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile 64-byte vectors with")
    target = tmp_path_factory.mktemp("wide_fused") / "wide.so"
    flags = ["-O2", "-fPIC", "-shared", "-mavx2", "-mfma", "-DPVC_VECTOR_BYTES=64", "-DPVC_ISA=avx2"]
    compile_harness(target, *flags)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=[*ISAS, pytest.param(WIDE, marks=pytest.mark.slow)])
def fused(request) -> Iterator[Fused]:
    """The fused passes with the kernels of one instruction set."""
    if EXTENSION is None:
        pytest.skip(MISSING)
    if request.param == WIDE:
        if "avx2" not in ISAS:
            pytest.skip("64-byte vectors are tested with AVX2 instructions, which this machine lacks")
        yield WideFused(request.getfixturevalue("wide_library"))
        return
    before = EXTENSION.current_isa()
    EXTENSION.use_isa(request.param)
    yield Fused()
    EXTENSION.use_isa(before)


@pytest.fixture(
    params=[
        f"{layout}-{dtype}-{text}" for text, layout, dtype in itertools.product(CUT, LAYOUTS, ("float32", "float64"))
    ]
)
def cut_problem(request) -> ConvProblem:
    layout, dtype, text = request.param.split("-", 2)
    return parse(text, layout, dtype)


def plain(problem: ConvProblem) -> ConvProblem:
    return problem.with_(activation="none", negative_slope=0.01, pool=None)


def activate(problem: ConvProblem, value: Tensor) -> Tensor:
    return APPLY[problem.activation](value, problem.negative_slope)


def pooled(problem: ConvProblem, value: Tensor) -> tuple[Tensor, Tensor]:
    pool: MaxPool = problem.pool
    return F.max_pool3d_with_indices(value, pool.window, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def expected(problem: ConvProblem, dense: Tensor) -> tuple[Tensor, Tensor]:
    """(value, code) that the forward pass returns for these convolution results."""
    value, indices = pooled(problem, activate(problem, dense))
    code = code_of_indices(indices, problem.output_size, problem.pool)
    return select(dense, code, problem.pool) if problem.activation in KEEPS_PREACTIVATION else value, code


def dense_in(problem: ConvProblem, tensor: Tensor) -> Tensor:
    dtype = tensor.dtype if tensor.dtype == torch.uint8 else getattr(torch, problem.dtype)
    return tensor.to(dtype).contiguous(memory_format=MEMORY_FORMAT[problem.layout])


def with_bias(args: list[Tensor]) -> list[Tensor | None]:
    return [*args, *[None] * (3 - len(args))]


def random_code(problem: ConvProblem) -> Tensor:
    """Codes of random maxima, which lie inside the output."""
    _, indices = pooled(problem, torch.randn(problem.output_shape))
    return dense_in(problem, code_of_indices(indices, problem.output_size, problem.pool))


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
    assert torch.equal(
        fused.grad_weight(problem, grad, code, x).double(), reference(plain(problem), "grad_weight", [dense, x])
    )


def test_integers_are_exact(fused, cut_problem, operands, reference, poisoned):
    check_integers(fused, cut_problem, operands, reference)


def test_within_bound_and_same_bits_for_every_thread_count(
    fused, cut_problem, operands, reference, assert_within_bound, threads
):
    problem, dense = cut_problem, plain(cut_problem)
    args = operands(dense, "forward")
    code, grad = random_code(problem), random_grad(problem, integers=False)
    scattered = scatter(grad, code, problem.output_size, problem.pool)
    _, weight = operands(dense, "grad_input")
    _, x = operands(dense, "grad_weight")

    def run() -> list[Tensor]:
        return [
            *fused.forward(problem, *with_bias(args)),
            fused.grad_input(problem, grad, code, weight),
            fused.grad_weight(problem, grad, code, x),
        ]

    threads(1)
    once = run()
    for count in (2, 3, 2):
        threads(count)
        assert all(map(torch.equal, run(), once)), f"{count} threads"
    assert_within_bound(once[2], dense, "grad_input", [scattered, weight], CPP.accuracy(problem, "grad_input"))
    assert_within_bound(once[3], dense, "grad_weight", [scattered, x], CPP.accuracy(problem, "grad_weight"))

    exact, magnitude = (reference(dense, "forward", each) for each in (args, [arg.abs() for arg in args]))
    eps = torch.finfo(getattr(torch, problem.dtype)).eps
    bound = eps * problem.reduction_length("forward") * magnitude + eps * exact.abs()
    value = once[0].double()
    best, _ = pooled(problem, activate(problem, exact))
    worst, _ = pooled(problem, bound)
    if problem.activation in KEEPS_PREACTIVATION:
        at_chosen = select(exact, once[1], problem.pool)
        assert ((value - at_chosen).abs() <= select(bound, once[1], problem.pool)).all()
        value = activate(problem, value)
    # No activation here is steeper than 1.13; its own rounding is a few units of the result.
    assert ((value - best).abs() <= 1.2 * worst + 8 * eps * (1 + best.abs())).all()
    chosen = select(activate(problem, exact), once[1], problem.pool)
    assert ((best - chosen).abs() <= 3 * worst + 16 * eps * (1 + best.abs())).all()


def constant_problem(text: str, layout: str, bias: float) -> tuple[ConvProblem, list[Tensor]]:
    """A convolution with weights of 1 at single taps, so that its results are the input plus `bias`."""
    problem = parse(text, layout)
    x = torch.randn(problem.input_shape).contiguous(memory_format=MEMORY_FORMAT[layout])
    weight = torch.eye(problem.in_channels).view(problem.weight_shape)
    return problem, [x, weight.contiguous(memory_format=MEMORY_FORMAT[layout]), torch.full((x.shape[1],), bias)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu(0.25)"])
@pytest.mark.parametrize("pool", ["2", "2ceil", "3s2p1", "2s1", "1x2x3"])
def test_ties_nan_and_infinities_resolve_as_torch(fused, layout, activation, pool):
    text = f"n2ic9oc9-i5x7x21-k1-bias-{activation}-pool{pool}"
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
    for share, bias in ((0.0, -20.0), (0.0, 0.0), (0.3, 0.0), (1.0, 0.0)):
        problem, (x, weight, offset) = constant_problem(text, layout, bias)
        chosen = specials[torch.randint(len(specials), x.shape)]
        x = torch.where(torch.rand(x.shape) < share, chosen, x.round()).contiguous(memory_format=MEMORY_FORMAT[layout])
        # One channel at a time: zero times an infinity of another channel is NaN.
        problem = problem.with_(groups=9)
        weight = torch.ones(problem.weight_shape).contiguous(memory_format=MEMORY_FORMAT[layout])
        value, code = fused.forward(problem, x, weight, offset)
        # Contiguous: torch 2.13 names a voxel of another window where all of a channels-last one are -infinity.
        want_value, want_code = expected(problem, (x + offset.view(-1, 1, 1, 1)).contiguous())
        assert torch.equal(value.nan_to_num(nan=1e30), want_value.nan_to_num(nan=1e30))
        assert torch.equal(code, want_code)


def test_zero_gradients_are_skipped_and_nan_reaches_its_own_values_only(fused):
    for layout, channels in itertools.product(LAYOUTS, (3, 8, 16)):
        problem = parse(f"n1ic{channels}oc9-i6x8x20-k3-p1-relu-pool2", layout)
        weight = dense_in(problem, torch.randn(problem.weight_shape))
        x = dense_in(problem, torch.randn(problem.input_shape))
        grad, code = torch.zeros(problem.pooled_shape), torch.zeros(problem.pooled_shape, dtype=torch.uint8)
        grad[0, 4, 1, 2, 3], code[0, 4, 1, 2, 3] = float("nan"), 5
        grad, code = dense_in(problem, grad), dense_in(problem, code)
        hit = fused.grad_input(problem, grad, code, weight).isnan()
        assert hit[0, :, 2:5, 3:6, 6:9].all()
        assert hit.sum() == channels * 27
        hit = fused.grad_weight(problem, grad, code, x).isnan()
        assert hit[4].all()
        assert hit.sum() == hit[4].numel()


def test_scratch_of_a_larger_problem_does_not_leak(fused, operands, reference):
    """Scratch memory is kept between calls: what a NaN problem left there must not reach the next result."""
    for layout in LAYOUTS:
        large = parse("n2ic20oc24-i6x7x33-k3-p2-relu-pool2", layout)
        nan = float("nan")
        args = [arg.fill_(nan) for arg in operands(plain(large), "forward")]
        fused.forward(large, *args, None)
        grad, code = random_grad(large, integers=False).fill_(nan), random_code(large)
        fused.grad_input(large, grad, code, args[1])
        fused.grad_weight(large, grad, code, args[0])
        for text in (
            "n1ic3oc5-i4x5x6-k3-p1-relu-pool2",
            "n1ic9oc5-i4x5x9-k3-p1-relu-pool2",
            "n1ic1oc5-i4x5x9-k3-pool2",
        ):
            check_integers(fused, parse(text, layout), operands, reference)


axis_size = st.integers(1, 15)
small = st.integers(1, 3)


@given(
    batch=small,
    groups=st.sampled_from((1, 1, 2, 5)),
    channels=st.tuples(st.integers(1, 26), st.integers(1, 26)),
    size=st.tuples(axis_size, axis_size, st.integers(1, 40)),
    kernel=st.tuples(small, st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(small, small, small),
    padding=st.tuples(*(st.tuples(st.integers(0, 3), st.integers(0, 3)) for _ in range(3))),
    dilation=st.tuples(small, small, small),
    window=st.tuples(small, small, st.integers(1, 5)),
    pool_stride=st.one_of(st.none(), st.tuples(small, small, st.integers(1, 6))),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(("float32", "float64")),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
)
def test_any_problem_is_exact_on_integers(
    batch, groups, channels, size, kernel, stride, padding, dilation, window, pool_stride, padded, ceil_mode,
    activation, dtype, layout, bias, operands, fused, reference,
):  # fmt: skip
    pool_padding = tuple(voxels // 2 if padded else 0 for voxels in window)
    for axis in range(3):
        output = (size[axis] + sum(padding[axis]) - (kernel[axis] - 1) * dilation[axis] - 1) // stride[axis] + 1
        assume(output >= 1)
        assume(output + 2 * pool_padding[axis] >= window[axis])
    in_channels, out_channels = (count * groups for count in channels)
    problem = ConvProblem(
        batch, in_channels, out_channels, size, kernel, stride, padding, dilation, groups, dtype, layout, bias=bias,
        activation=activation, negative_slope=0.25 if activation == "leaky_relu" else 0.01,
        pool=MaxPool(window, pool_stride or window, pool_padding, ceil_mode),
    )  # fmt: skip
    check_integers(fused, problem, operands, reference)


@pytest.mark.slow
@pytest.mark.sanitizer
@pytest.mark.parametrize("flags", [["-DPVC_ISA=baseline"], ["-DPVC_ISA=avx2", "-mavx2", "-mfma"]], ids=["sse2", "avx2"])
def test_no_access_outside_of_buffers(flags, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build with a sanitizer")
    if "avx2" in flags[0] and "avx2" not in ISAS:
        pytest.skip("this machine lacks AVX2")
    program = tmp_path / "harness"
    compile_harness(
        program, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DHARNESS_MAIN", *flags
    )
    problems = [parse(text, layout) for text in CUT for layout in LAYOUTS]
    text = "\n".join(" ".join(map(str, numbers(problem))) for problem in problems)
    ran = subprocess.run([str(program)], input=text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:4000]
    assert ran.stdout == f"{len(problems)} problems\n"
