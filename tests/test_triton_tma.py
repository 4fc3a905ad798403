"""Implicit GEMM with TMA: its boxes, blocks and splits in the interpreter; tests/test_triton.py says how that runs."""

from __future__ import annotations

import math

import pytest
import torch

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.triton_tma import TritonTma
from pyvolconv.backends.triton_tma_ways import Way
from pyvolconv.problem import PASSES, ConvProblem

from .hopper import compile_on

pytest.importorskip("triton")

BACKEND = TritonTma()
MANY_BLOCKS = (
    "n2ic20oc36-i3x4x5-k2x1x2-p1x0x1-bias",  # channels in several blocks, the last ones not full
    "n1ic20oc20-i5x4x6-k2x1x2-p1-d2x1x3-bias",
    "n1ic4oc8-i2x7x3-k1x3x2-p0+1x2+0x1+0",  # more zeros at one end
    "n3ic8oc4-i3x4x5-k3x4x5",  # one voxel of output
)


def on_this_machine(text: str) -> ConvProblem:
    problem = ConvProblem.parse(text)
    return problem.with_(device="cuda") if torch.cuda.is_available() else problem


@pytest.fixture
def any_box_start(monkeypatch):
    """Triton's interpreter wants boxes to start at multiples of 16 bytes; the hardware wants that of rows only."""
    import numpy
    from triton.runtime import interpreter

    def places(box, starts):
        item_bytes = box.base.dtype.element_ty.primitive_bitwidth // 8
        axes = numpy.ix_(
            *(start.data.item() + numpy.arange(extent) for start, extent in zip(starts, box.block_shape, strict=True))
        )
        address = box.base.data.item() + sum(
            axis * stride.data.item() * item_bytes for axis, stride in zip(axes, box.strides, strict=True)
        )
        inside = numpy.ones(box.block_shape, dtype=bool)
        for axis, size in zip(axes, box.shape, strict=True):
            inside &= (axis >= 0) & (axis < size.data.item())
        return (
            interpreter.TensorHandle(address.astype(numpy.uint64), box.base.dtype.scalar),
            interpreter.TensorHandle(inside, interpreter.tl.int1),
        )

    monkeypatch.setattr(interpreter.TensorDescHandle, "materialize_pointers", places)


def assert_exact(problem, pass_, configuration, operands, run_pass, reference):
    args = [arg.to(problem.device) for arg in operands(problem, pass_, integers=True)]
    got = run_pass(BACKEND.configured(configuration), problem, pass_, args)
    assert torch.equal(got.cpu().double(), reference(problem, pass_, args))


@pytest.mark.parametrize(("layout", "way"), [("ncdhw", "1-moved"), ("ndhwc", "3")])
@pytest.mark.parametrize("text", MANY_BLOCKS)
def test_exact_on_integers_in_many_blocks(require, poisoned, operands, run_pass, reference, text, layout, way, pass_):
    problem = on_this_machine(f"cpu-float32-{layout}-{text}")
    require(BACKEND, problem, pass_)
    assert_exact(problem, pass_, f"m32n16k16w4s2-{way}", operands, run_pass, reference)


@pytest.mark.parametrize("text", ["n1ic20oc24-i2x3x8-k1x2x3-p0x1x1-bias", "n1ic20oc8-i1x3x20-k1x2x3-p0x1x1-d1x2x1"])
def test_runs_along_the_width_of_ncdhw(any_box_start, require, poisoned, operands, run_pass, reference, text, pass_):
    problem = on_this_machine(f"cpu-float32-ncdhw-{text}")
    require(BACKEND, problem, pass_)
    assert_exact(problem, pass_, "m16n16k16w4s2-2", operands, run_pass, reference)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_float32_sums(require, poisoned, operands, run_pass, assert_within_bound, dtype, pass_):
    problem = on_this_machine(f"cpu-{dtype}-ndhwc-n1ic24oc16-i4x5x6-k3-p1-bias")
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_)]
    got = run_pass(BACKEND.configured("m32n16k16w4s2-2"), problem, pass_, args)
    assert_within_bound(got, problem, pass_, args, BACKEND.accuracy(problem, pass_))


def test_split_sums_have_the_same_bits_again(require, operands, run_pass, pass_):
    problem = on_this_machine("cpu-float32-ndhwc-n1ic32oc16-i4x6x7-k3-p1")
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_)]
    backend = BACKEND.configured("m32n16k16w4s2-4")
    assert torch.equal(run_pass(backend, problem, pass_, args), run_pass(backend, problem, pass_, args))


@pytest.mark.parametrize("size", [(1, 60, 104), (8, 16, 16), (128, 128, 128), (3, 5, 7), (1, 1, 1), (4, 240, 416)])
@pytest.mark.parametrize("voxels", [64, 128, 256])
def test_box_covers_with_the_least_surplus(size, voxels):
    from pyvolconv.kernels.triton_tma import box_of

    def surplus(box):
        return math.prod(-(-extent // side) * side for extent, side in zip(size, box, strict=True)) - math.prod(size)

    box = box_of(size, voxels)
    sides = [1 << power for power in range(9)]
    every = [(d, h, w) for d in sides for h in sides for w in sides if d * h * w == voxels]
    assert math.prod(box) == voxels
    assert surplus(box) == min(map(surplus, every))


def test_every_configuration_is_a_way_to_run_it():
    for layout in ("ncdhw", "ndhwc"):
        problem = ConvProblem.parse(f"cuda-bfloat16-{layout}-n1ic192oc192-i6x240x416-k3-p0x1x1")
        for pass_ in PASSES:
            configurations = BACKEND.configurations(problem, pass_)
            assert 3 <= len(configurations) == len(set(configurations))
            for configuration in configurations:
                assert str(Way.parse(configuration)) == configuration


def test_says_what_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = ConvProblem.parse("cpu-float16-ndhwc-n1ic16oc24-i4-k3")
    for pass_ in PASSES:
        refused = BACKEND.unsupported_reasons(problem.with_(groups=2, stride=(1, 2, 1)), pass_)
        assert refused[-2:] == ["groups=2: it takes 1", "stride=(1, 2, 1): it takes 1"]
    narrow = problem.with_(out_channels=12)
    reason = "out_channels=12: rows of 24 bytes are no multiple of 16"
    assert BACKEND.unsupported_reasons(narrow, "grad_input")[-1:] == [reason]
    assert reason not in BACKEND.unsupported_reasons(narrow, "forward"), "results are written without a descriptor"


def test_says_which_gpus_it_can_run_on(monkeypatch):
    """12.x has the accelerator and less than half of the shared memory that its blocks take."""
    problem = ConvProblem.parse("cuda-bfloat16-ndhwc-n1ic64oc64-i8-k3-p1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    for capability, able in {(8, 9): False, (9, 0): True, (10, 3): True, (12, 0): False, (12, 1): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device, found=capability: found)
        reasons = BACKEND.unsupported_reasons(problem, "forward")
        assert able == (not reasons)
        assert able or "compute capability 9.0 to 11.x" in reasons[0]


def test_says_that_coordinates_have_32_bits(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = ConvProblem.parse("cpu-float32-ndhwc-n1ic8oc8-i4-k1x1x2-p0x0x0+2147483643-d1x1x2147483643")
    assert BACKEND.unsupported_reasons(problem, "forward") == []
    (reason,) = BACKEND.unsupported_reasons(problem.with_(padding=((0, 0), (0, 0), (1, 2**31 - 5))), "forward")
    assert reason == "2147483648 voxels along an axis, padding included: coordinates have 32 bits"


def test_does_not_copy_what_is_ndhwc_already(require, operands, run_pass, pass_):
    problem = on_this_machine("cpu-float32-ndhwc-n1ic8oc8-i2x3x4-k1x1x2")
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_)]
    with pytest.raises(ValueError, match="'m16n16k16w4s2-1-moved' copies ncdhw into ndhwc"):
        run_pass(BACKEND.configured("m16n16k16w4s2-1-moved"), problem, pass_, args)


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_an_infinity_reaches_no_other_results_than_documented(require, run_pass, reference, layout):
    """See `Accuracy`: NaN where it says so, and nowhere a finite number that has to be none."""
    moved = "-moved" if layout == "ncdhw" else ""
    backend = BACKEND.configured(f"m16n16k16w4s2-1{moved}")
    problem = on_this_machine(f"cpu-float32-{layout}-n1ic20oc8-i2x3x5-k1x1x3")
    memory_format = MEMORY_FORMAT[problem.layout]

    def ones(shape, *infinite):
        tensor = torch.ones(shape, device=problem.device).contiguous(memory_format=memory_format)
        for place in infinite:
            tensor[place] = torch.inf
        return tensor

    require(backend, problem, "forward")
    args = [ones(problem.input_shape), ones(problem.weight_shape, (3, 2, 0, 0, 1))]
    got = run_pass(backend, problem, "forward", args)
    assert not got[:, 3].isfinite().any()
    others = torch.arange(8) != 3
    assert torch.equal(got[:, others].cpu().double(), reference(problem, "forward", args)[:, others])

    args = [ones(problem.output_shape), ones(problem.input_shape, (0, 2, 1, 1, 4))]
    got = run_pass(backend, problem, "grad_weight", args)
    assert torch.equal(got[:, 2, 0, 0, 2].cpu(), torch.full((8,), torch.inf))
    others = torch.arange(20) != 2
    assert torch.equal(got[:, others].cpu().double(), reference(problem, "grad_weight", args)[:, others])


COMPILE = """
from pyvolconv.kernels.triton_blocks import Blocks
from pyvolconv.kernels.triton_tma import forward, grad_input
from pyvolconv.kernels.triton_tma_grad_weight import grad_weight

for case in sys.argv[1:]:
    dtype, layout, size, blocks, precision = eval(case)
    memory_format = getattr(torch, layout)
    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    x, weight = tensor(2, 128, *size), tensor(128, 128, 3, 3, 3)
    ones, blocks = (1, 1, 1), Blocks.parse(blocks)
    for launches in (
        forward(x, weight, None, ones, ones, x, blocks, 1, precision),
        grad_input(x, weight, ones, ones, x, blocks, 2, precision),
        grad_weight(x, x, ones, ones, weight, blocks, 0, precision),
    ):
        code = compiled(launches[0])
        print("wgmma.mma_async" in code.asm["ptx"], code.metadata.shared, order_of_loop(code.asm["ttgir"]))
"""

HOPPER = [
    "(torch.bfloat16, 'channels_last_3d', (8, 32, 64), 'm128n128k64w8s4', 'ieee')",
    "(torch.float16, 'channels_last_3d', (6, 7, 9), 'm128n64k64w4s4', 'ieee')",
    "(torch.bfloat16, 'contiguous_format', (8, 32, 64), 'm128n128k64w8s4', 'ieee')",
    "(torch.float32, 'channels_last_3d', (8, 32, 64), 'm128n128k32w8s4', 'tf32')",
]


@pytest.mark.slow
def test_operands_are_fetched_ahead_on_hopper(tmp_path):
    """Compiled without a GPU: on tensor cores, in the shared memory there is, and a step waits for what an earlier one
    began to fetch. One branch in the loop is enough for Triton to fetch and wait in the same step.
    """
    rows = compile_on(COMPILE, HOPPER, tmp_path)
    assert len(rows) == 3 * len(HOPPER)
    for tensor_core, shared_bytes, order in rows:
        assert tensor_core == "True"
        assert int(shared_bytes) <= 227 * 1024
        assert order == "ahead"
