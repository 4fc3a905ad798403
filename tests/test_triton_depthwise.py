"""Depthwise and small groups in Triton: tiles, walks, phases and masks in the interpreter, and compiled for a GPU.

The problem set runs in test_backends; here a program has few lanes and a lane several outputs, so that small problems
have many programs, and tiles that reach over the ends.
"""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends import cuda_peak
from pyvolconv.backends.triton_depthwise import TritonDepthwise
from pyvolconv.problem import PASSES, ConvProblem

from .hopper import compile_on

pytest.importorskip("triton")

BACKEND = TritonDepthwise()
PROBLEM = ConvProblem.parse("cpu-float32-ncdhw-n1g2ic2oc2-i4-k3")
MANY_PROGRAMS = (
    ("n2g2ic2oc2-i4x3x7-k3x2x3-p1-bias", (2, 4)),  # tiles that reach over the ends
    ("n1g3ic3oc3-i4x3x8-k2x2x3-p1x0+1x2-d2x1x3", (1, 4)),  # taps of a tile that are apart
    ("n1g2ic2oc2-i5x6x5-k3x3x2-s2x2x1-p1-d1x2x1-bias", (2, 1)),  # strides: a plane for each tap, and phases
    ("n1g2ic2oc2-i6x5x7-k3x2x2-s3x1x2-p2+1x0x1-d2x1x3", (1, 2)),  # and a dilation with and without common factors
    ("n1g3ic3oc9-i4x5x6-k2-p1", (2, 1)),  # a channel multiplier
    ("n2g2ic4oc6-i3x4x5-k2x1x3-s1x2x3-p1x0x2-bias", (1, 2)),  # small groups
    ("n1g2ic2oc2-i3x3x4-k6x5x5-p3x2x2", (1, 2)),  # too many taps to carry sums from plane to plane
)
"""Problems, and the outputs of a lane."""


@pytest.fixture
def few_lanes(monkeypatch):
    from pyvolconv.kernels import triton_depthwise_tiles as rules

    def use(tile, programs=4, lanes_of_gradient=16):
        monkeypatch.setattr(rules, "PROGRAMS", programs)
        monkeypatch.setattr(rules, "TILES", (tile,))
        monkeypatch.setattr(rules, "LARGEST_LANES", 32)
        monkeypatch.setattr(rules, "LARGEST_LANES_OF_GRADIENT", lanes_of_gradient)
        monkeypatch.setattr(rules, "LEAST_DEPTH", 2)

    return use


def on_this_machine(text: str) -> ConvProblem:
    problem = ConvProblem.parse(text)
    return problem.with_(device="cuda") if torch.cuda.is_available() else problem


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize(("text", "tile"), MANY_PROGRAMS)
def test_exact_on_integers_in_many_programs(
    few_lanes, require, poisoned, operands, run_pass, reference, text, tile, layout, pass_
):
    problem = on_this_machine(f"cpu-float32-{layout}-{text}")
    few_lanes(tile if layout == "ncdhw" else tile[::-1])
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_, integers=True)]
    got = run_pass(BACKEND, problem, pass_, args)
    assert torch.equal(got.cpu().double(), reference(problem, pass_, args))


@pytest.mark.parametrize("width", [2, 4])
def test_outputs_of_a_lane_are_stored_together(few_lanes, require, poisoned, operands, run_pass, reference, width):
    """Rows of a contiguous result that a tile's width divides."""
    from pyvolconv.kernels.triton_depthwise import forward

    problem = on_this_machine("cpu-float32-ncdhw-n2g3ic3oc3-i3x5x8-k3-p1-bias")
    few_lanes((1, width))
    require(BACKEND, problem, "forward")
    args = [arg.to(problem.device) for arg in operands(problem, "forward", integers=True)]
    (launch,) = forward(*args, (1, 1, 1), (1, 1, 1), (1, 1, 1), 3, args[0].new_empty(problem.output_shape))
    assert launch.arguments["SIDE_BY_SIDE"]
    assert launch.grid[0] > 1
    assert torch.equal(run_pass(BACKEND, problem, "forward", args).cpu().double(), reference(problem, "forward", args))


@pytest.mark.parametrize(("dtype", "layout"), [("float16", "ndhwc"), ("bfloat16", "ncdhw")])
@pytest.mark.parametrize("text", ["n2g4ic4oc4-i4x5x6-k3-p1-bias", "n1g2ic4oc4-i5x4x6-k3x2x3-s2x1x1-p1x0x1"])
def test_half_precision_keeps_float32_sums(
    require, poisoned, operands, run_pass, assert_within_bound, text, dtype, layout, pass_
):
    problem = on_this_machine(f"cpu-{dtype}-{layout}-{text}")
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_)]
    got = run_pass(BACKEND, problem, pass_, args)
    accuracy = BACKEND.accuracy(problem, pass_)
    assert accuracy.accumulate_dtype == "float32"
    assert got.dtype == getattr(torch, dtype)
    assert_within_bound(got, problem, pass_, args, accuracy)


def test_partial_sums_are_split_by_the_problem_and_added_in_order(
    few_lanes, require, operands, run_pass, assert_within_bound
):
    """Many programs for one channel, more partial sums than are added at a time, and the same bits again."""
    from pyvolconv.kernels.triton_depthwise_grad_weight import grad_weight

    problem = on_this_machine("cpu-float32-ndhwc-n1g2ic2oc2-i1x9x11-k1x1x2")
    few_lanes((1, 1), programs=528, lanes_of_gradient=2)
    require(BACKEND, problem, "grad_weight")
    args = [arg.to(problem.device) for arg in operands(problem, "grad_weight")]
    multiply, add = grad_weight(
        *args, problem.stride, (0, 0, 0), problem.dilation, problem.groups, args[0].new_empty(problem.weight_shape)
    )
    assert add.arguments["splits"] == multiply.grid[0] > add.arguments["ROWS"]
    first = run_pass(BACKEND, problem, "grad_weight", args)
    assert torch.equal(first, run_pass(BACKEND, problem, "grad_weight", args))
    assert_within_bound(first, problem, "grad_weight", args, BACKEND.accuracy(problem, "grad_weight"))


def test_offsets_are_64_bit():
    """A view whose strides pass 2**31 values: only its few used pages exist."""
    from pyvolconv.kernels.triton_depthwise import forward

    problem = PROBLEM.with_(batch=2, dtype="float16")
    reasons = BACKEND.unsupported_reasons(problem, "forward")
    if reasons or torch.cuda.is_available():
        pytest.skip(f"in the interpreter only, a GPU would have to hold all 8 GiB: {'; '.join(reasons)}")
    channel_stride, sample_stride = 2**31 + 64, 2**31 + 128
    memory = torch.UntypedStorage(2 * (sample_stride + channel_stride + 64))
    x = torch.empty(0, dtype=torch.float16).set_(
        memory, 0, problem.input_shape, (sample_stride, channel_stride, 16, 4, 1)
    )
    x.copy_(torch.randint(-3, 4, problem.input_shape))
    weight = torch.randint(-3, 4, problem.weight_shape).half()
    y = torch.empty(problem.output_shape, dtype=torch.float16)
    forward(x, weight, None, (1, 1, 1), (0, 0, 0), (1, 1, 1), 2, y)[0].run()
    assert torch.equal(y, torch.nn.functional.conv3d(x.contiguous(), weight, groups=2))


def test_tiles_are_large_where_enough_programs_remain(monkeypatch):
    from pyvolconv.kernels import triton_depthwise_tiles as rules

    monkeypatch.setattr(rules, "PROGRAMS", 528)
    monkeypatch.setattr(rules, "TILES", ((4, 4), (2, 2), (1, 1)))
    monkeypatch.setattr(rules, "LARGEST_LANES", None)
    monkeypatch.setattr(rules, "LARGEST_LANES_OF_GRADIENT", None)
    for channels_last in (False, True):
        arguments = ((3, 3, 3), 1, channels_last, True)
        large = rules.tiles(8, 64, (32, 128, 128), *arguments)
        assert (large.height, large.width) == ((2, 2) if channels_last else (4, 4)), "twice the lanes of a thread"
        assert large.walk
        assert large.hold
        small = rules.tiles(1, 64, (8, 16, 16), *arguments)
        assert (small.height, small.width) == (1, 1)
        assert not rules.tiles(8, 64, (32, 128, 128), (6, 6, 6), 1, channels_last, True).walk
        assert not rules.tiles(8, 64, (32, 128, 128), (3, 3, 3), 1, channels_last, False).walk
        # A tile no larger than the outputs.
        assert rules.tiles(999, 64, (32, 128, 2), *arguments).width == 2
        assert rules.gradient_tiles(8, 64, 1, (32, 128, 128), (3, 3, 3), channels_last, True).walk


def test_says_what_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for pass_ in PASSES:
        assert BACKEND.unsupported_reasons(PROBLEM.with_(groups=1), pass_) == [
            "convolves several groups of up to 8 channels, not 1 of 2"
        ]
        assert BACKEND.unsupported_reasons(PROBLEM.with_(in_channels=18), pass_) == [
            "convolves several groups of up to 8 channels, not 2 of 9"
        ]
        wide = PROBLEM.with_(kernel_size=(1, 9, 9), input_size=(9, 9, 9))
        assert BACKEND.unsupported_reasons(wide, pass_) == ["takes up to 64 taps in a plane of the kernel, not 9 x 9"]
        assert BACKEND.unsupported_reasons(PROBLEM.with_(dtype="float64"), pass_) == [
            "computes in float32, float16 or bfloat16, not in float64"
        ]


def test_expects_what_memory_or_multiplication_allow(pass_):
    """Few taps: bytes; many: multiplications outside of tensor cores."""
    from pyvolconv.backends.triton_implicit_gemm import TritonImplicitGemm

    few = ConvProblem.parse("cuda-float16-ndhwc-n8g64ic64oc64-i15x75x315-k1x1x3-p0x0x1")
    many = few.with_(kernel_size=(5, 5, 5), padding=((2, 2),) * 3)
    for problem in (few, many):
        expected = BACKEND.expected_efficiency(problem, pass_)
        seconds = problem.flops(pass_) / (expected * cuda_peak.PEAK["float16"])
        assert seconds >= problem.min_bytes(pass_) / cuda_peak.BYTES_PER_SECOND
        assert expected < 67e12 / cuda_peak.PEAK["float16"]
        assert expected > TritonImplicitGemm().expected_efficiency(problem, pass_)
    assert BACKEND.expected_efficiency(many, pass_) > BACKEND.expected_efficiency(few, pass_)
    on_cpu = few.with_(device="cpu")
    assert 1e-4 > BACKEND.expected_efficiency(on_cpu, pass_) > TritonImplicitGemm().expected_efficiency(on_cpu, pass_)


def test_configurations_compute_the_same(require, operands, run_pass, reference, pass_):
    """Every one that tuning tries on a GPU, also where it is too large for the problem."""
    problem = on_this_machine("cpu-float32-ndhwc-n1g2ic2oc2-i10x3x4-k2x1x2-s1x1x2-p0x0x1")
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_, integers=True)]
    configurations = BACKEND.configurations(problem.with_(device="cuda"), pass_)
    assert "h4w2d5" in configurations
    for configuration in configurations:
        got = run_pass(BACKEND.configured(configuration), problem, pass_, args)
        assert torch.equal(got.cpu().double(), reference(problem, pass_, args)), configuration


def test_cuts_as_text():
    from pyvolconv.kernels.triton_depthwise_tiles import Cut, cuts

    for cut in [*cuts(15), Cut(1, 1, 1)]:
        assert Cut.parse(str(cut)) == cut
    assert {cut.depth for cut in cuts(15)} == {15, 8}
    for text in ("", "h4w2", "h4w2d15 ", "h0w2d15", "m4n2k15"):
        with pytest.raises(ValueError, match=r"names no outputs of a lane; expected a form like 'h4w2d15'"):
            Cut.parse(text)


COMPILE = """
from pyvolconv.kernels.triton_depthwise import forward, grad_input
from pyvolconv.kernels.triton_depthwise_grad_weight import grad_weight

def compile_all(dtype, channels, out_channels, kernel, stride, groups, layout):
    memory_format = getattr(torch, layout)
    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    x, weight = tensor(2, channels, 16, 64, 64), tensor(out_channels, channels // groups, *kernel)
    y = tensor(2, out_channels, *(-(-size // step) for size, step in zip((16, 64, 64), stride)))
    bias = torch.empty(out_channels, dtype=dtype, device="meta")
    geometry = (stride, tuple(taps // 2 for taps in kernel), (1, 1, 1), groups)
    for launch in [
        *forward(x, weight, bias, *geometry, y),
        *grad_input(y, weight, *geometry, x),
        *grad_weight(y, x, *geometry, weight),
    ]:
        code = compiled(launch)
        assert len(code.asm["cubin"]) > 0
        print(launch.kernel.__name__, code.metadata.shared, code.asm["ptx"].count(".local"))

for case in sys.argv[1:]:
    compile_all(*eval(case))
"""

HOPPER = (
    "(torch.float16, 64, 64, (3, 3, 3), (1, 1, 1), 64, 'channels_last_3d')",
    "(torch.bfloat16, 54, 54, (3, 3, 3), (1, 1, 1), 54, 'contiguous_format')",
    "(torch.float32, 32, 64, (3, 3, 3), (2, 2, 2), 16, 'channels_last_3d')",
    "(torch.float16, 16, 16, (7, 7, 7), (1, 1, 1), 16, 'contiguous_format')",
)
"""Arguments of `compile_all`."""


@pytest.mark.slow
def test_compiles_for_hopper_without_a_gpu(tmp_path):
    """Down to machine code for compute capability 9.0, with every tuple of tensors in registers."""
    lines = compile_on(COMPILE, HOPPER, tmp_path)
    names = ["depthwise_kernel"] * 2 + ["depthwise_grad_weight_kernel", "add_rows_kernel"]
    assert [name for name, _, _ in lines] == names * len(HOPPER)
    for name, shared_bytes, in_memory in lines:
        assert int(shared_bytes) <= 227 * 1024, f"{name}: more shared memory than a Hopper multiprocessor has"
        assert in_memory == "0", f"{name}: a tuple is in memory"
