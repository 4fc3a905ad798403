"""im2col: tiles of every size give the same convolution, and the columns stay within their bound."""

from __future__ import annotations

import math

import pytest
import torch

from pyvolconv.backends.base import MEMORY_FORMAT
from pyvolconv.backends.im2col import Im2colBackend
from pyvolconv.backends.registry import select
from pyvolconv.kernels import im2col
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem

from .closeness import assert_close

BACKEND = Im2colBackend()
TILED = (
    "n3ic2oc3-i4x5x6-k3-p1-bias",
    "n2ic9oc4-i5x4x7-k3x2x3-s2x1x3-p1+2x0+1x2+0-d1x2x1",
    "n2g2ic4oc6-i5x6x7-k2-s1x2x1",
    "n1ic1oc2-i2x3x4-k2-s3-p4",
    "n2g8ic8oc8-i4x5x6-k3-p1",
    "n5ic3oc8-i2x4x4-k2x4x4-s2x4x4",
)


@pytest.mark.parametrize("column_bytes", [0, 600, 5_000, 40_000])
@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("text", TILED)
def test_any_tile_size_gives_the_exact_sum(
    monkeypatch, poisoned, operands, run_pass, reference, text, layout, column_bytes, pass_
):
    """Down to one voxel at a time; tiles that lie in the padding alone are among them."""
    monkeypatch.setitem(im2col.COLUMN_BYTES, "cpu", column_bytes)
    problem = ConvProblem.parse(f"cpu-float32-{layout}-{text}")
    args = operands(problem, pass_, integers=True)
    got = run_pass(BACKEND, problem, pass_, args)
    assert torch.equal(got.double(), reference(problem, pass_, args))


@pytest.mark.parametrize("column_bytes", [2_000, 50_000])
def test_columns_stay_within_their_bound(monkeypatch, operands, run_pass, column_bytes, pass_):
    """No buffer of columns is larger than the bound, and the whole batch's columns are far larger."""
    problem = ConvProblem.parse("cpu-float32-ndhwc-n2ic9oc9-i9x10x11-k3-p1")
    args = operands(problem, pass_)
    monkeypatch.setitem(im2col.COLUMN_BYTES, "cpu", column_bytes)
    sizes = []
    columns_of = im2col._columns

    def measured(*arguments):
        for tile, columns in columns_of(*arguments):
            sizes.append(columns.untyped_storage().nbytes())
            yield tile, columns

    monkeypatch.setattr(im2col, "_columns", measured)
    run_pass(BACKEND, problem, pass_, args)
    assert 0 < max(sizes) <= column_bytes
    assert len(sizes) > 1
    assert 4 * 9 * 27 * math.prod(problem.output_size) * problem.batch > 10 * column_bytes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, [1, 1, 1, 1]),
        (5, [1, 1, 1, 5]),
        (7, [1, 1, 1, 7]),
        (15, [1, 1, 2, 7]),
        (84, [1, 2, 6, 7]),
        (999, [4, 5, 6, 7]),
    ],
)
def test_tiles_are_runs_in_row_major_order(limit, expected):
    assert im2col._tile_sizes([4, 5, 6, 7], limit) == expected


def test_says_what_it_cannot_run():
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i4-k3")
    for pass_ in PASSES:
        assert BACKEND.unsupported_reasons(problem, pass_) == []
        assert BACKEND.unsupported_reasons(problem.with_(dtype="bfloat16"), pass_) == [
            "computes in float32 or float64, not in bfloat16"
        ]
        assert BACKEND.unsupported_reasons(problem.with_(device="mps"), pass_) == [
            "runs on cpu and cuda tensors, not on mps"
        ]


def test_declared_accuracy_follows_the_switch_of_matmul():
    problem = ConvProblem.parse("cpu-float32-ncdhw-n1ic2oc3-i4-k3")
    assert BACKEND.accuracy(problem, "forward").accumulate_dtype == "float32"
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        accuracy = BACKEND.accuracy(problem, "forward")
        assert accuracy.accumulate_dtype == "bfloat16"
        assert BACKEND.accuracy(problem.with_(dtype="float64"), "forward").accumulate_dtype == "float64"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert BACKEND.accuracy(problem, "forward").accumulate_dtype == "float32"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["n5ic3oc7-i2x4x5-k2x4x5-s2x4x5", "n2ic3oc4-i2-k2-p0+1", "n0ic3oc4-i2-k2"])
def test_a_window_that_is_the_whole_input(text, layout):
    """One window in each sample, but for padding at the end, which makes several."""
    problem = ConvProblem.parse(f"cpu-float64-{layout}-{text}")
    x, w, grad = (
        torch.randn(shape, dtype=torch.float64).contiguous(memory_format=MEMORY_FORMAT[layout])
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    ours, torchs = select("im2col")[0], select("aten")[0]
    for pass_, operands in {"forward": (x, w, None), "grad_input": (grad, w), "grad_weight": (grad, x)}.items():
        result, expected = (getattr(backend, pass_)(problem, *operands) for backend in (ours, torchs))
        assert_close(result, expected)
        assert result.is_contiguous(memory_format=MEMORY_FORMAT[layout])
