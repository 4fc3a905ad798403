"""The operators inside torch: opcheck, compile, autocast, FLOP counter, checkpointing, strides of results."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyvolconv
from pyvolconv import ops
from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.problem import PASSES, ConvProblem

from .closeness import assert_close

FORMATS = list(MEMORY_FORMAT.values())
# Sizes that reach the vectorised paths: full register tiles, several of them, and an edge.
LARGE = (
    "n2ic16oc32-i6x9x20-k3-p1-bias",
    "n2ic1oc16-i9x10x24-k3-p1",
    "n1ic12oc20-i5x8x18-k1-bias",
    "n2g2ic16oc16-i5x7x17-k3-s2-p1",
    "n1g16ic16oc16-i5x7x17-k3-p1+0x1x1",
)


def call(problem, requires_grad=True, dtype=torch.float32):
    """(x, weight, bias, *geometry) of the operator conv3d."""
    layout = MEMORY_FORMAT[problem.layout]
    x = torch.randn(problem.input_shape, dtype=dtype).to(memory_format=layout)
    w = torch.randn(problem.weight_shape, dtype=dtype).to(memory_format=layout)
    b = torch.randn(problem.out_channels, dtype=dtype) if problem.bias else None
    if requires_grad:
        for tensor in (x, w, b):
            if tensor is not None:
                tensor.requires_grad_()
    padding = [side for pair in problem.padding for side in pair]
    return x, w, b, list(problem.stride), padding, list(problem.dilation), problem.groups


@pytest.fixture(params=[(text, layout) for text in LARGE for layout in MEMORY_FORMAT], ids="-".join)
def large(request):
    text, layout = request.param
    return ConvProblem.parse(f"cpu-float32-{layout}-{text}")


def test_opcheck(large, pass_):
    """Schema, autograd registration, fake tensors (exact strides) and AOTDispatch with dynamic shapes."""
    x, w, b, *geometry = call(large)
    grad = torch.randn(large.output_shape).to(memory_format=MEMORY_FORMAT[large.layout]).requires_grad_()
    if pass_ == "forward":
        operator, args = ops.conv3d, (x, w, b, *geometry)
    elif pass_ == "grad_input":
        operator, args = ops.conv3d_grad_input, (grad, w, list(large.input_size), *geometry)
    else:
        operator, args = ops.conv3d_grad_weight, (grad, x, list(large.kernel_size), *geometry)
    results = opcheck(operator, args, raise_exception=True)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("w_format", FORMATS)
@pytest.mark.parametrize("text", [*LARGE, "n1ic1oc1-i4x4x4-k3", "n2ic3oc4-i3x4x5-k1", "n2ic4oc8-i1x1x1-k1"])
def test_layout_of_results_and_gradients(text, x_format, w_format):
    """channels_last_3d when x or w is; ".grad" has the strides of its leaf, or DDP would copy its buckets."""
    problem = ConvProblem.parse(f"cpu-float32-ncdhw-{text}")
    x, w, b, *geometry = call(problem, requires_grad=False)
    x = x.to(memory_format=x_format).requires_grad_()
    w = w.to(memory_format=w_format).requires_grad_()
    y = ops.conv3d(x, w, b, *geometry)
    expected = MEMORY_FORMAT[ops.layout_of(x, w)]
    assert y.is_contiguous(memory_format=expected)
    if min(*problem.output_size) > 1 and problem.out_channels > 1 and problem.in_channels > 1:
        assert (expected is torch.channels_last_3d) == (torch.channels_last_3d in (x_format, w_format))
    y.backward(torch.randn_like(y))
    for leaf in (x, w):
        # The stride of an axis of size 1 is never used; torch's accumulation of gradients ignores it too.
        used = [axis for axis in range(5) if leaf.shape[axis] > 1]
        assert [leaf.grad.stride(axis) for axis in used] == [leaf.stride(axis) for axis in used]


@pytest.mark.parametrize("text", ["n2ic3oc4-i4x5x6-k3-p1-bias", "n2g2ic4oc6-i5x4x6-k2-s2-bias"])
@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, FORMATS)))
def test_strides_are_those_of_torch(text, formats):
    problem = ConvProblem.parse(f"cpu-float32-ncdhw-{text}")
    x, w, b, stride, padding, dilation, groups = call(problem, requires_grad=False)
    x, w = x.to(memory_format=formats[0]), w.to(memory_format=formats[1])
    y = pyvolconv.conv3d(x, w, b, stride, padding[::2], dilation, groups)
    expected = F.conv3d(x, w, b, stride, padding[::2], dilation, groups)
    assert_close(y, expected)
    if torch.backends.mkldnn.is_available():
        assert y.stride() == expected.stride()


@pytest.fixture
def fresh_compiler():
    """Code compiled for other tests would count towards the limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("dynamic", "compiler"),
    [
        (True, "aot_eager"),
        pytest.param(False, "aot_eager", marks=pytest.mark.slow),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_whole_graph(large, dynamic, compiler):
    check_compiled(large, dynamic, compiler)


@pytest.mark.parametrize("layout", MEMORY_FORMAT)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_the_default_compiler(layout):
    """One of the cases above that is not left out with the slow ones: Inductor checks strides at run time."""
    check_compiled(ConvProblem.parse(f"cpu-float32-{layout}-{LARGE[0]}"), True, "inductor")


def check_compiled(large, dynamic, compiler):
    x, w, b, stride, padding, dilation, groups = call(large)
    padding = padding[::2]

    def function(x, w, b):
        y = pyvolconv.conv3d(torch.relu(x), w, b, stride, padding, dilation, groups)
        return pyvolconv.conv_transpose3d(y * 2, w, None, stride, padding, 0, groups, dilation).abs()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    operands = [tensor for tensor in (x, w, b) if tensor is not None]
    for batch in (x, torch.cat([x.detach(), x.detach()]).requires_grad_() if dynamic else x):
        operands[0] = batch
        y, expected = compiled(batch, w, b), function(batch, w, b)
        assert_close(y, expected)
        assert y.stride() == expected.stride()
        cotangent = torch.randn_like(expected)
        gradients = torch.autograd.grad(y, operands, cotangent)
        for got, wanted in zip(gradients, torch.autograd.grad(expected, operands, cotangent), strict=True):
            # The same kernels; only torch's own reductions around them may sum in another order.
            assert_close(got / wanted.abs().max(), wanted / wanted.abs().max())


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_keeps_a_forced_backend_and_does_not_recompile_for_a_batch():
    x, w = torch.randn(2, 4, 5, 6, 7), torch.randn(4, 4, 3, 3, 3)
    count = 0

    def count_graphs(graph, inputs):
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(
        lambda x: pyvolconv.conv3d(x, w, padding=1), fullgraph=True, dynamic=True, backend=count_graphs
    )
    with pyvolconv.use_backend("numba"):
        for batch in (2, 3, 5):
            more = x[:1].repeat(batch, 1, 1, 1, 1)
            assert torch.equal(compiled(more), pyvolconv.conv3d(more, w, padding=1))
    assert count == 1


def test_export_keeps_the_operator():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyvolconv.Conv3d(2, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x).relu()

    net, x = Net().eval(), torch.randn(2, 2, 5, 6, 7)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    assert any("pyvolconv.conv3d" in str(node.target) for node in program.graph.nodes)
    for size in (2, 5):
        more = x[:1].repeat(size, 1, 1, 1, 1)
        assert_close(program.module()(more), net(more))


@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_autocast_computes_in_bfloat16_as_torch_does(name):
    x = torch.randn(2, 4, 5, 5, 5, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, 3, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    results = []
    for function in (getattr(pyvolconv, name), getattr(F, name)):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, w, b, padding=1)
        gradients = torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
        assert y.dtype == torch.bfloat16
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append((y, *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * theirs.abs().max()


def test_autocast_leaves_float64_alone_and_can_be_switched_off():
    x, w = torch.randn(1, 2, 4, 4, 4), torch.randn(3, 2, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert pyvolconv.conv3d(x.double(), w.double()).dtype == F.conv3d(x.double(), w.double()).dtype
        with torch.autocast("cpu", enabled=False):
            assert pyvolconv.conv3d(x, w).dtype == torch.float32


def test_flop_counter(float32_problem):
    problem = float32_problem
    x, w, b, *geometry = call(problem)
    with FlopCounterMode(display=False) as counter:
        y = ops.conv3d(x, w, b, *geometry)
        assert counter.get_total_flops() == problem.with_(bias=False).flops("forward")
        y.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert sorted(counts.values()) == [problem.with_(bias=False).flops("forward")] * 3
    assert sorted(str(op) for op in counts) == sorted(
        f"pyvolconv.conv3d{suffix}" for suffix in ("", "_grad_input", "_grad_weight")
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_forced_backend(reentrant):
    x, w = torch.randn(1, 2, 5, 5, 5, requires_grad=True), torch.randn(2, 2, 3, 3, 3, requires_grad=True)

    def twice(x):
        return pyvolconv.conv3d(pyvolconv.conv3d(x, w, padding=1).relu(), w, padding=1)

    expected = torch.autograd.grad(twice(x).sum(), (x, w))
    y = checkpoint(twice, x, use_reentrant=reentrant)
    y.sum().backward()
    assert_close((x.grad, w.grad), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_meta_tensors_have_shapes_without_arithmetic(dtype):
    x = torch.empty(2, 4, 1000, 1000, 1000, dtype=dtype, device="meta")
    w = torch.empty(6, 2, 3, 3, 3, dtype=dtype, device="meta")
    y = pyvolconv.conv3d(x, w, stride=2, groups=2)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 6, 499, 499, 499), dtype)


@pytest.mark.parametrize("pass_name", PASSES)
def test_inference_mode_and_views(pass_name):
    """Expanded, transposed, sliced and flipped operands, as they come."""
    base = torch.randn(7, 6, 5, 4, 2)
    views = [base.permute(4, 3, 2, 1, 0), base.permute(4, 3, 2, 1, 0)[:, :, ::2], base[:1, :4].expand(3, 4, 5, 4, 2)]
    for x in views:
        w = torch.randn(3, 2, 2, 2).unsqueeze(1).expand(3, x.shape[1], 2, 2, 2)
        with torch.inference_mode():
            assert_close(pyvolconv.conv3d(x, w, padding=1), F.conv3d(x, w, padding=1))
