"""The Triton kernels: every block and mask of them in the interpreter, and compiled for a GPU without one.

conftest.py sets TRITON_INTERPRET=1 where there is no CUDA device, before Triton or a kernel is imported. The
whole problem set runs in test_backends; here the blocks are as small as they can be, so that small problems
have many of them, and the dtypes are those that only this path has.
"""

from __future__ import annotations

import pytest
import torch

from pyvolconv.backends.triton_implicit_gemm import TritonImplicitGemm
from pyvolconv.problem import PASSES, ConvProblem

from .hopper import compile_on

pytest.importorskip("triton")

BACKEND = TritonImplicitGemm()
SMALL_BLOCKS = {2: (32, 16, 16), 4: (32, 16, 16)}
PROBLEM = ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i4-k3")
MANY_BLOCKS = (
    "n2ic17oc18-i3x4x5-k2x1x2-p1x0x0-bias",  # summed channels in two blocks for each tap
    "n2ic3oc18-i3x4x5-k3x2x2-p1x0x1",  # (tap, channel) as one index, in several blocks
    "n1ic18oc3-i5x4x6-k3x1x2-s2x1x3-p1x0x1-d1x1x2",  # phases of a stride, with few output channels
    "n1g2ic34oc6-i3x4x5-k1x2x3-s1x2x1-p0x1x2",
    "n2g3ic3oc6-i4x5x4-k3-s3x2x1-p2+1x0+2x1-d2x3x1",  # a stride and a dilation with and without common factors
)


@pytest.fixture
def small_blocks(monkeypatch):
    from pyvolconv.kernels import triton_common, triton_grad_weight

    monkeypatch.setattr(triton_common, "LARGEST_BLOCKS", SMALL_BLOCKS)
    monkeypatch.setattr(triton_grad_weight, "MIN_STEPS", 1)


def on_this_machine(text: str) -> ConvProblem:
    problem = ConvProblem.parse(text)
    return problem.with_(device="cuda") if torch.cuda.is_available() else problem


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("text", MANY_BLOCKS)
def test_exact_on_integers_in_many_blocks(
    small_blocks, require, poisoned, operands, run_pass, reference, text, layout, pass_
):
    problem = on_this_machine(f"cpu-float32-{layout}-{text}")
    require(BACKEND, problem, pass_)
    args = [arg.to(problem.device) for arg in operands(problem, pass_, integers=True)]
    got = run_pass(BACKEND, problem, pass_, args)
    assert torch.equal(got.cpu().double(), reference(problem, pass_, args))


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("text", ["n2ic3oc5-i4x5x6-k3-s2x1x1-p1-bias", "n1g2ic34oc6-i3x4x5-k1x2x3-p0x1x2"])
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
    small_blocks, require, operands, run_pass, assert_within_bound
):
    """Split-K in many parts, and the same bits again."""
    from pyvolconv.kernels import triton_grad_weight

    problem = on_this_machine("cpu-float32-ndhwc-n2ic2oc3-i6x7x8-k2")
    require(BACKEND, problem, "grad_weight")
    args = [arg.to(problem.device) for arg in operands(problem, "grad_weight")]
    multiply, add = triton_grad_weight.grad_weight(
        *args, problem.stride, (0, 0, 0), problem.dilation, problem.groups, args[0].new_empty(problem.weight_shape)
    )
    assert add.arguments["splits"] == multiply.arguments["splits"] == multiply.grid[0] > 20
    first = run_pass(BACKEND, problem, "grad_weight", args)
    assert torch.equal(first, run_pass(BACKEND, problem, "grad_weight", args))
    assert_within_bound(first, problem, "grad_weight", args, BACKEND.accuracy(problem, "grad_weight"))


def test_offsets_are_64_bit():
    """A view whose strides pass 2**31 values: only its few used pages exist."""
    from pyvolconv.kernels.triton_forward import forward

    problem = PROBLEM.with_(batch=2)
    reasons = BACKEND.unsupported_reasons(problem, "forward")
    if reasons:
        pytest.skip(f"in the interpreter only, a GPU would have to hold all 12 GiB: {'; '.join(reasons)}")
    channel_stride, sample_stride = 2**30 + 64, 2**31 + 128
    memory = torch.UntypedStorage(4 * (sample_stride + channel_stride + 64))
    x = torch.empty(0).set_(memory, 0, problem.input_shape, (sample_stride, channel_stride, 16, 4, 1))
    x.copy_(torch.randint(-3, 4, problem.input_shape))
    weight = torch.randint(-3, 4, problem.weight_shape).float()
    y = torch.empty(problem.output_shape)
    (launch,) = forward(x, weight, None, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, y)
    launch.run()
    assert torch.equal(y, torch.nn.functional.conv3d(x.contiguous(), weight))


def test_says_what_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for pass_ in PASSES:
        assert BACKEND.unsupported_reasons(PROBLEM.with_(dtype="float64"), pass_)[-1] == (
            "computes in float32, float16 or bfloat16, not in float64"
        )
        assert BACKEND.unsupported_reasons(PROBLEM.with_(device="mps"), pass_) == ["runs on cuda tensors, not on mps"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert BACKEND.unsupported_reasons(PROBLEM, "forward") == [
        "runs on cuda tensors, not on cpu; for tests start Python with TRITON_INTERPRET=1"
    ]
    if not torch.cuda.is_available():
        assert BACKEND.unsupported_reasons(PROBLEM.with_(device="cuda"), "forward") == ["torch sees no CUDA device"]


def test_says_that_the_interpreter_came_too_late(monkeypatch):
    from pyvolconv.kernels import triton_common

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    (reason,) = BACKEND.unsupported_reasons(PROBLEM, "forward")
    assert "after the kernels were loaded" in reason


def test_says_that_an_old_interpreter_needs_an_old_numpy(monkeypatch):
    import numpy
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(numpy, "__version__", "2.4.1")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    (reason,) = BACKEND.unsupported_reasons(PROBLEM, "forward")
    assert reason == "the interpreter of Triton 3.6.0 needs NumPy < 2.4, this is 2.4.1"
    monkeypatch.setattr(triton, "__version__", "3.10.0+git")
    assert BACKEND.unsupported_reasons(PROBLEM, "forward") == []


def test_tf32_follows_torchs_switch_on_cuda_only():
    on_cuda = PROBLEM.with_(device="cuda")
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        assert BACKEND.accuracy(on_cuda, "forward").accumulate_dtype == "float16", "TF32 has float16's fraction bits"
        assert BACKEND.accuracy(PROBLEM, "forward").accumulate_dtype == "float32"
        assert BACKEND.accuracy(on_cuda.with_(dtype="bfloat16"), "forward").accumulate_dtype == "float32"
        torch.backends.cudnn.allow_tf32 = False
        assert BACKEND.accuracy(on_cuda, "forward").accumulate_dtype == "float32"
    finally:
        torch.backends.cudnn.allow_tf32 = before


COMPILE = """
from pyvolconv.kernels.triton_epilogue import Epilogue
from pyvolconv.kernels.triton_forward import forward
from pyvolconv.kernels.triton_grad_input import grad_input
from pyvolconv.kernels.triton_grad_weight import grad_weight

def compile_all(dtype, channels, out_channels, stride, groups, layout, precision, activation):
    memory_format = getattr(torch, layout)
    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    x, weight = tensor(2, channels, 16, 32, 32), tensor(out_channels, channels // groups, 3, 3, 3)
    y = tensor(2, out_channels, *(-(-size // step) for size, step in zip((16, 32, 32), stride)))
    bias = torch.empty(out_channels, dtype=dtype, device="meta")
    geometry = (stride, (1, 1, 1), (1, 1, 1), groups)
    launches = [
        *forward(x, weight, bias, *geometry, y, precision),
        *forward(x, weight, bias, *geometry, y, precision, epilogue=Epilogue(activation, 0.1, y)),
        *grad_input(y, weight, *geometry, x, precision),
        *grad_weight(y, x, *geometry, weight, precision),
    ]
    for launch in launches:
        code = compiled(launch)
        assert len(code.asm["cubin"]) > 0
        tensor_core = any(name in code.asm["ptx"] for name in ("wgmma.mma_async", "mma.sync"))
        print(launch.kernel.__name__, tensor_core, code.metadata.shared)

for case in sys.argv[1:]:
    compile_all(*eval(case))
"""

HOPPER = {
    "(torch.float16, 64, 64, (1, 1, 1), 1, 'channels_last_3d', 'ieee', 'silu')": True,
    "(torch.bfloat16, 64, 64, (2, 2, 2), 1, 'contiguous_format', 'ieee', 'gelu')": True,
    "(torch.float32, 32, 32, (1, 1, 1), 32, 'channels_last_3d', 'ieee', 'leaky_relu')": False,
    "(torch.float32, 24, 32, (1, 1, 1), 1, 'channels_last_3d', 'tf32', 'gelu_tanh')": True,
}
"""Arguments of `compile_all`, and whether the products must run on tensor cores."""


@pytest.mark.slow
def test_compiles_for_hopper_without_a_gpu(tmp_path):
    """Down to machine code for compute capability 9.0; 16-bit and TF32 products run on its tensor cores."""
    lines = compile_on(COMPILE, HOPPER, tmp_path)
    names = ["forward_kernel", "forward_kernel", "grad_input_kernel", "grad_weight_kernel", "add_partials_kernel"]
    assert [name for name, _, _ in lines] == names * len(HOPPER)
    on_tensor_cores = [on for on in HOPPER.values() for _ in names]
    for (name, tensor_core, shared_bytes), expected in zip(lines, on_tensor_cores, strict=True):
        assert int(shared_bytes) <= 227 * 1024, f"{name}: more shared memory than a Hopper multiprocessor has"
        if name != "add_partials_kernel":
            assert tensor_core == str(expected)
