"""Any problem that the fused passes can be asked for is exact on integers."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from pyvolconv.epilogue import ACTIVATIONS, MaxPool
from pyvolconv.problem import LAYOUTS, ConvProblem

from .checks import check_integers

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
