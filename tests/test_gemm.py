"""Windows that do not overlap as one matrix product: exact, copied only where they must be, chosen where it pays."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyvolconv.backends import cuda_peak
from pyvolconv.backends.aten_on_cuda import COSTS, kind_of
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.gemm import GemmBackend, _copied_bytes
from pyvolconv.backends.registry import select
from pyvolconv.dispatch import choose
from pyvolconv.kernels import gemm
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

BACKEND = GemmBackend()
PROBLEMS = (
    "n3ic3oc5-i4x6x6-k2x3x3-s2x3x3-bias",
    "n2ic3oc5-i5x7x8-k2x3x3-s2x3x3-bias",  # voxels past the last window
    "n1ic2oc3-i7x6x8-k2x1x2-s3x2x4",  # and between windows
    "n2ic17oc4-i8x3x4-k2x3x4-s2x1x5",  # slices of the whole height and width
    "n3ic4oc6-i3x4x5-k3x4x5-bias",  # one window
    "n3ic4oc6-i4x4x7-k3x2x5-s2x9x3-d1x3x1",  # one window that is not the whole input, dilated
    "n2ic2oc3-i7x7x7-k2-s4x3x3-d3x2x2",
    "n2ic5oc3-i4x5x6-k1-bias",  # summed over voxels sample by sample
    "n2ic15oc13-i1x2x3-k1",  # and after a copy
    "n1ic5oc3-i4x5x6-k1-d3x2x4-bias",
    "n2ic3oc4-i9x8x7-k1-s2x3x1-bias",
    "n2ic1oc1-i2x4x6-k1x2x3-s1x2x3",
    "n2ic3oc4-i4x6x12-k2x2x1-s2x2x1",  # voxels side by side, not what a window reads
)
A_PRODUCT_ONLY = {
    "ncdhw-n4ic3oc5-i2x3x4-k2x3x4-s2x3x4-bias": PASSES,
    "ndhwc-n4ic3oc5-i2x3x4-k2x3x4": PASSES,
    "ndhwc-n2ic5oc3-i4x5x6-k1-bias": PASSES,
    "ncdhw-n1ic5oc3-i4x5x6-k1-bias": PASSES,
    "ncdhw-n2ic5oc3-i4x5x6-k1-bias": PASSES[:2],  # the weight's gradient is a sum of two products
    "ndhwc-n2ic5oc3-i4x5x6-k2x5x6-s2x5x6": PASSES,
    "ncdhw-n1ic1oc3-i4x5x6-k2x5x6-s2x5x6": PASSES,
}


class Operators(TorchDispatchMode):
    """Counts those that compute or copy, by name."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "copy_", "clone", "sum", "zero_", "_to_copy", "add")

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.counted[name] += 1
        return function(*args, **(kwargs or {}))


def on_this_machine(text: str) -> ConvProblem:
    problem = ConvProblem.parse(f"cpu-{text}")
    return problem.with_(device="cuda") if torch.cuda.is_available() else problem


@pytest.fixture
def on_cuda(monkeypatch):
    """The choices that are made where there is a Hopper GPU, without one; switches are torch's defaults at the end."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    "limits",
    [{"FEWEST_ROWS": 1}, {"FEWEST_ROWS": 1000}, {"FEWEST_ROWS": 1, "LARGEST_BATCH": 1}],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", PROBLEMS)
def test_exact_on_integers(monkeypatch, poisoned, operands, run_pass, reference, text, layout, limits, pass_):
    """In one product, in one for each sample, and in one after a copy."""
    for name, value in limits.items():
        monkeypatch.setattr(gemm, name, value)
    problem = on_this_machine(f"float32-{layout}-{text}")
    assert BACKEND.unsupported_reasons(problem, pass_) == []
    args = operands(problem, pass_, integers=True)
    got = run_pass(BACKEND, problem, pass_, args)
    assert torch.equal(got.cpu().double(), reference(problem, pass_, args))
    assert got.is_contiguous(memory_format=MEMORY_FORMAT[layout])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["n2ic3oc5-i5x7x8-k2x3x3-s2x3x3-bias", "n2ic20oc9-i4x5x6-k1-bias"])
def test_other_dtypes_within_bound(operands, run_pass, assert_within_bound, text, layout, dtype, pass_):
    problem = on_this_machine(f"{dtype}-{layout}-{text}")
    args = operands(problem, pass_)
    got = run_pass(BACKEND, problem, pass_, args)
    assert got.dtype == args[0].dtype
    assert_within_bound(got, problem, pass_, args, BACKEND.accuracy(problem, pass_))


@pytest.mark.parametrize("text", A_PRODUCT_ONLY)
def test_what_is_a_matrix_is_not_copied(operands, run_pass, text, pass_):
    """One call of BLAS and nothing else: it reads the input and writes the result where they are."""
    problem = on_this_machine(f"float32-{text}")
    args = operands(problem, pass_)
    gemm_of_batch = problem.layout == "ncdhw" and problem.batch > 1 and problem.output_size != (1, 1, 1)
    with Operators() as operators:
        run_pass(BACKEND, problem, pass_, args)
    if pass_ in A_PRODUCT_ONLY[text]:
        name = "bmm" if gemm_of_batch else "mm"
        bias = problem.bias and pass_ == "forward"
        assert operators.counted == {{"mm": "addmm", "bmm": "baddbmm"}[name] if bias else name: 1}
    else:
        assert operators.counted == {"bmm": 1, "sum": 1, "copy_": 1}
    assert _copied_bytes(problem) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patches_are_copied_once(operands, run_pass, layout, pass_):
    problem = on_this_machine(f"float32-{layout}-n1ic3oc5-i4x6x6-k2x3x3-s2x3x3")
    args = operands(problem, pass_)
    with Operators() as operators:
        run_pass(BACKEND, problem, pass_, args)
    assert operators.counted == {"mm": 1, "copy_": 1}
    assert _copied_bytes(problem) == 2 * 4 * 3 * 4 * 6 * 6


def test_many_patches_cut_out_beforehand_stay_where_they_are():
    """1.2 GB of input: by strides alone, no tensor of that size is made."""
    for layout in LAYOUTS:
        problem = ConvProblem.parse(f"cuda-bfloat16-{layout}-n522240ic3oc1280-i2x14x14-k2x14x14-s2x14x14")
        assert _copied_bytes(problem) == 0
    assert _copied_bytes(problem.with_(batch=1, input_size=(4, 28, 28))) == 2 * 2 * 3 * 4 * 28 * 28


@pytest.mark.parametrize(
    ("text", "voxels_side_by_side"),
    [
        ("ncdhw-n1ic3oc4-i8x8x16-k2x2x1-s2x2x1", True),
        ("ncdhw-n1ic3oc4-i8x8x16-k1-s2", True),
        ("ndhwc-n1ic3oc4-i8x8x16-k1-s2", False),
        ("ncdhw-n1ic3oc4-i8x8x16-k2-s2", False),
        ("ncdhw-n1ic3oc4-i8x8x8-k2x2x1-s2x2x1", True),
        ("ncdhw-n1ic3oc4-i4x4x8-k2x2x1-s2x2x1", False),  # 32 windows are merged with those of other samples
    ],
)
def test_copies_keep_side_by_side_what_is(operands, text, voxels_side_by_side):
    """Reads and writes of a copy are then runs in memory."""
    problem = ConvProblem.parse(f"cpu-float32-{text}")
    x, weight = operands(problem, "forward", integers=True)
    y = torch.empty(problem.output_shape)
    rows = gemm._rows(gemm._windows(x, weight, y, problem.stride, (0, 0, 0), problem.dilation, 1))
    assert rows.stride()[1:].index(1) == (0 if voxels_side_by_side else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_partial_products_of_half_precision_are_added_in_float32_on_cuda(dtype):
    """What only a GPU runs: that torch takes the call, on tensors without memory."""
    left, right = (torch.empty(2, 3, 4, dtype=dtype, device="meta") for _ in range(2))
    assert torch.bmm(left, right.transpose(1, 2), out_dtype=torch.float32).dtype == torch.float32


def test_windows_too_far_apart_for_blas_are_copied(monkeypatch, operands, run_pass, reference, pass_):
    """A matrix whose rows start more than 2**31 values apart, with a smaller number in its place."""
    problem = ConvProblem.parse("cpu-float32-ncdhw-n3ic1oc4-i8x5x6-k2x5x6-s9x5x6")
    assert _copied_bytes(problem) == 0
    monkeypatch.setattr(gemm, "LARGEST_STRIDE", 239)
    assert _copied_bytes(problem) == 2 * 4 * 3 * 60
    args = operands(problem, pass_, integers=True)
    with Operators() as operators:
        got = run_pass(BACKEND, problem, pass_, args)
    assert operators.counted["copy_"] == 1
    assert torch.equal(got.double(), reference(problem, pass_, args))


def test_says_what_it_cannot_run():
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic4oc6-i4-k2-s2")
    for pass_ in PASSES:
        assert BACKEND.unsupported_reasons(problem, pass_) == []
        (reason,) = BACKEND.unsupported_reasons(problem.with_(groups=2), pass_)
        assert "groups=2" in reason
        (reason,) = BACKEND.unsupported_reasons(problem.with_(padding=((0, 0), (0, 1), (0, 0))), pass_)
        assert "padding=((0, 0), (0, 1), (0, 0))" in reason
        for overlap in ({"stride": (2, 1, 2)}, {"dilation": (1, 1, 2), "input_size": (4, 4, 6)}):
            (reason,) = BACKEND.unsupported_reasons(problem.with_(**overlap), pass_)
            assert "do not overlap" in reason
        (reason,) = BACKEND.unsupported_reasons(problem.with_(batch=2**28), pass_)
        assert reason == f"BLAS counts in 32 bits; the windows are a matrix of {2**31} x 32"
        assert BACKEND.unsupported_reasons(problem.with_(batch=2**28 - 1), pass_) == []
        (reason,) = BACKEND.unsupported_reasons(problem.with_(dtype="int32"), pass_)
        assert reason == "computes in float64, float32, float16 or bfloat16, not in int32"
        assert BACKEND.unsupported_reasons(problem.with_(device="mps"), pass_) == [
            "runs on cpu and cuda tensors, not on mps"
        ]


def test_a_whole_input_is_its_choice_on_the_cpu_unless_products_round_more(pass_):
    problem = ConvProblem.parse("cpu-float32-ncdhw-n64ic3oc96-i8-k8")
    assert choose(problem, pass_).name == "gemm"
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.mkldnn.conv.fp32_precision
    torch.set_float32_matmul_precision("medium")
    try:
        assert choose(problem, pass_).name != "gemm"
        (reason,) = BACKEND.unsupported_reasons(problem, pass_)
        assert reason.startswith("matrix products would round more than convolutions: torch.backends.mkldnn.matmul")
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        assert BACKEND.unsupported_reasons(problem, pass_) == []
        assert BACKEND.accuracy(problem, pass_).accumulate_dtype == "bfloat16"
    finally:
        torch.backends.mkldnn.conv.fp32_precision = conv
        torch.set_float32_matmul_precision(matmul)
    assert BACKEND.accuracy(problem, pass_).accumulate_dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("text", ["n4ic16oc16-i8-k1", "n2ic32oc64-i32-k2-s2"])
def test_other_kernels_are_the_choice_on_the_cpu(text, dtype, pass_):
    for layout in LAYOUTS:
        assert choose(ConvProblem.parse(f"cpu-{dtype}-{layout}-{text}"), pass_).name != "gemm"


@pytest.mark.parametrize(
    "text", ["n2ic3oc768-i16x112x112-k2x16x16-s2x16x16", "n1ic3oc1152-i1x448x448-k1x14x14-s1x14x14"]
)
def test_patches_of_few_channels_are_its_choice_on_the_cpu(text, pass_):
    for layout in LAYOUTS:
        assert choose(ConvProblem.parse(f"cpu-float32-{layout}-{text}"), pass_).name == "gemm"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "text",
    [
        "n12920ic3oc1280-i2x14x14-k2x14x14-s2x14x14",
        "n8ic3oc768-i16x224x224-k2x16x16-s2x16x16-bias",
        "n1ic384oc768-i3x60x104-k1-bias",
    ],
)
def test_is_the_choice_on_cuda(on_cuda, text, dtype, pass_):
    for layout in LAYOUTS:
        problem = ConvProblem.parse(f"cuda-{dtype}-{layout}-{text}")
        assert choose(problem, pass_).name == "gemm"
        assert choose(problem.with_(padding=((1, 1),) * 3), pass_).name != "gemm"


def test_float32_on_cuda_rounds_no_more_than_convolutions_may(on_cuda, pass_):
    problem = ConvProblem.parse("cuda-float32-ncdhw-n512ic3oc1280-i2x14x14-k2x14x14")
    for matmul, conv, able in ((0, 0, True), (0, 1, True), (1, 1, True), (1, 0, False)):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = bool(matmul), bool(conv)
        reasons = BACKEND.unsupported_reasons(problem, pass_)
        if able:
            assert reasons == []
            assert BACKEND.accuracy(problem, pass_).accumulate_dtype == ("float16" if matmul else "float32")
            assert cuda_peak.arithmetic(problem) == ("tf32" if conv else "float32")
            if matmul == conv:
                assert choose(problem, pass_).name == "gemm"
        else:
            (reason,) = reasons
            assert 'torch.backends.cuda.matmul.fp32_precision is "tf32"' in reason
            assert choose(problem, pass_).name != "gemm"
        assert BACKEND.unsupported_reasons(problem.with_(dtype="bfloat16"), pass_) == []


def test_products_slower_than_convolutions_are_expected_to_be(on_cuda, pass_):
    problem = ConvProblem.parse("cuda-float32-ncdhw-n12920ic3oc1280-i2x14x14-k2x14x14")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    fast = BACKEND.expected_efficiency(problem, pass_)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert BACKEND.expected_efficiency(problem, pass_) < fast / 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_cuda_declares_how_parts_are_added(monkeypatch, on_cuda, dtype, pass_):
    problem = ConvProblem.parse(f"cuda-{dtype}-ncdhw-n12920ic3oc1280-i2x14x14-k2x14x14")
    switch = f"allow_{'fp16' if dtype == 'float16' else 'bf16'}_reduced_precision_reduction"
    before = getattr(torch.backends.cuda.matmul, switch)
    try:
        for allowed, declared in ((True, dtype), (False, "float32")):
            setattr(torch.backends.cuda.matmul, switch, allowed)
            accuracy = BACKEND.accuracy(problem, pass_)
            assert (accuracy.constant, accuracy.accumulate_dtype) == (2.0, declared)
            assert accuracy.bitwise_reproducible
    finally:
        setattr(torch.backends.cuda.matmul, switch, before)


def test_sums_in_float16_are_not_for_convolutions(on_cuda, pass_):
    problem = ConvProblem.parse("cuda-float16-ncdhw-n512ic3oc1280-i2x14x14-k2x14x14")
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        (reason,) = BACKEND.unsupported_reasons(problem, pass_)
        assert "allow_fp16_accumulation" in reason
        assert choose(problem, pass_).name != "gemm"
        assert choose(problem.with_(dtype="bfloat16"), pass_).name == "gemm"
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert choose(problem, pass_).name == "gemm"


def test_is_not_chosen_where_torch_would_raise_for_determinism(monkeypatch, on_cuda, pass_):
    problem = ConvProblem.parse("cuda-float16-ncdhw-n512ic3oc1280-i2x14x14-k2x14x14")
    assert choose(problem, pass_).name == "gemm"
    torch.use_deterministic_algorithms(True)
    try:
        (reason,) = BACKEND.unsupported_reasons(problem, pass_)
        assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in reason
        assert choose(problem, pass_).name != "gemm"
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert BACKEND.unsupported_reasons(problem, pass_) == []
        torch.use_deterministic_algorithms(True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert BACKEND.unsupported_reasons(problem, pass_) == []
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose(problem, pass_).name == "gemm"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("n4ic3oc1280-i2x14x14-k2x14x14", "patches"),
        ("n4ic3oc64-i16x32x32-k2x4x4-s2x4x4", "patches"),
        ("n4ic64oc64-i16x32x32-k2-s2", "dense"),
        ("n4ic64oc64-i16x32x32-k3-p1", "dense"),
        ("n4ic64oc64-i16x32x32-k1", "one tap"),
        ("n4ic3oc64-i16x32x32-k3-p1", "few channels"),
        ("n1g64ic64oc128-i16x32x32-k3-p1", "depthwise"),
        ("n1g2ic64oc128-i16x32x32-k3-p1", "grouped"),
    ],
)
def test_cost_of_torch_on_cuda_goes_by_kind(text, kind, pass_):
    problem = ConvProblem.parse(f"cuda-float16-ndhwc-{text}")
    assert kind_of(problem) == kind
    assert all(set(of_kind) == set(PASSES) for of_kind in COSTS.values())
    (aten,) = select("aten")
    share = aten.expected_efficiency(problem, pass_)
    assert 0 < share < COSTS[kind][pass_].reached
    assert aten.expected_efficiency(problem.with_(layout="ncdhw"), pass_) <= share
