"""The whole space of arguments, impossible ones included: torch's result, or torch's error in torch's words."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note
from hypothesis import strategies as st

import pyvolconv

# What a user may write for a size per axis; most of it is sensible, some of it is not.
ODD_SIZES = st.sampled_from(
    [-1, 0, 7, (1,), (1, 2), (1, 2, 1, 2), (), [2, 1, 2], (0, 1, 1), (1, -2, 1), 1.5, "two", None]
)
DTYPES = st.sampled_from(
    [torch.float32] * 8
    + [torch.float64] * 4
    + [torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.bool, torch.uint8]
)
tried = {"conv3d": [0, 0], "conv_transpose3d": [0, 0]}


def sizes(draw, low, high, odd):
    if odd:
        return draw(ODD_SIZES)
    return draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * 3)))


def strided(draw, shape, dtype):
    """A tensor of that shape: contiguous, channels last, permuted, sliced or expanded; half of them want a gradient."""
    values = torch.randint(-3, 4, shape) if not dtype.is_floating_point else torch.randn(shape)
    tensor = laid_out(draw, values.to(dtype), shape)
    differentiable = dtype.is_floating_point or dtype.is_complex
    return tensor.requires_grad_(differentiable and draw(st.booleans()))


def laid_out(draw, tensor, shape):
    kind = draw(st.sampled_from(["contiguous", "channels last", "permuted", "sliced", "expanded"]))
    if kind == "channels last" and tensor.dim() == 5:
        return tensor.to(memory_format=torch.channels_last_3d)
    if kind == "permuted":
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if kind == "sliced" and tensor.dim():
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if kind == "expanded" and tensor.dim():
        axis = draw(st.integers(0, tensor.dim() - 1))
        return tensor.narrow(axis, 0, min(1, shape[axis])).expand(shape)
    return tensor


def three(value):
    return value if isinstance(value, tuple) else (value,) * 3


def fitting(draw, transposed, kernel, options):
    """Voxels per axis for which numbers in `options` make a convolution; its `output_padding` is cut to fit."""
    steps, sides, gaps = (
        three(options.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    if "output_padding" in options:
        extra = three(options["output_padding"])
        options["output_padding"] = tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, steps, gaps, strict=True))
    reach = [gap * (taps - 1) + 1 - 2 * side for gap, taps, side in zip(gaps, kernel, sides, strict=True)]
    if transposed:
        least = [max(1, -(-(step - voxels + 1) // step)) for step, voxels in zip(steps, reach, strict=True)]
    else:
        least = [max(1, voxels) for voxels in reach]
    return [draw(st.integers(voxels, voxels + 4)) for voxels in least]


@st.composite
def calls(draw, transposed):
    """(operands, options) of a call; about one in two makes a convolution."""
    # Which one thing, if any, is wrong or odd about the call.
    odd = draw(
        st.sampled_from(
            [None] * 12
            + ["stride", "padding", "dilation", "groups", "channels", "bias", "rank", "dtype", "empty", "weight rank"]
            + ["output_padding", "string"]
        )
    )
    groups = draw(st.integers(1, 3))
    c_in, c_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * 3))
    dtype = draw(DTYPES)

    options = {
        "stride": sizes(draw, 1, 3, odd == "stride"),
        "padding": sizes(draw, 0, 3, odd == "padding"),
        "dilation": sizes(draw, 1, 3, odd == "dilation"),
        "groups": draw(st.sampled_from([0, -1, groups + 1, 1.0, None])) if odd == "groups" else groups,
    }
    if transposed:
        options["output_padding"] = sizes(draw, 0, 2, odd == "output_padding")
    elif odd == "string":
        options["padding"] = draw(st.sampled_from(["same", "valid", "full", ""]))
        options["stride"] = draw(st.sampled_from([1, 1, 2]))
    for name in draw(st.sets(st.sampled_from(sorted(options)))):
        if name != odd and (name != "groups" or groups == 1):
            options.pop(name)

    numbers = odd not in ("stride", "padding", "dilation", "output_padding", "string")
    if numbers and draw(st.integers(0, 9)):
        voxels = fitting(draw, transposed, kernel, options)
    else:
        voxels = draw(st.tuples(*[st.integers(1, 7)] * 3))
    x_shape = [draw(st.integers(1, 3)), c_in, *voxels]
    w_shape = [c_in, c_out // groups, *kernel] if transposed else [c_out, c_in // groups, *kernel]
    b_shape = [c_out]
    if odd == "empty":
        which = draw(st.sampled_from([x_shape, w_shape, b_shape]))
        which[draw(st.integers(0, len(which) - 1))] = 0
    if odd == "channels":
        x_shape[1] += draw(st.sampled_from([-1, 1, groups]))
    if odd == "bias":
        b_shape = draw(st.sampled_from([[c_out + 1], [], [1], [c_out, 1]]))
    if odd == "rank":
        x_shape = draw(st.sampled_from([[], x_shape[:3], [*x_shape, 2]]))
    elif draw(st.booleans()):
        x_shape = x_shape[1:]
    if odd == "weight rank":
        w_shape = draw(st.sampled_from([w_shape[:4], [*w_shape, 1], []]))

    dtypes = [dtype] * 3
    if odd == "dtype":
        dtypes[draw(st.integers(0, 2))] = draw(DTYPES)
    operands = [strided(draw, shape, kind) for shape, kind in zip((x_shape, w_shape, b_shape), dtypes, strict=True)]
    if draw(st.booleans()) and odd != "bias":
        operands[2] = None
    return operands, options


def outcome(function, operands, options):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*operands, **options), None
    except Exception as error:
        return None, error


def words(error):
    """The first line, without what says whether an argument came by position or by keyword."""
    line = str(error).splitlines()[0]
    line = re.sub(r" \(position \d+\)", "", line)
    return re.sub(r"invalid combination of arguments - got .*", "invalid combination of arguments", line)


def exact(name, operands, options):
    """(what torch computes in float64, the operands of which a gradient is wanted)."""
    several = [
        None if operand is None else operand.detach().double().requires_grad_(operand.requires_grad)
        for operand in operands
    ]
    wanted = [operand for operand in several if operand is not None and operand.requires_grad]
    return getattr(F, name)(*several, **options), wanted


def check(name, operands, options):
    # oneDNN's bfloat16 kernels crash for some sizes with stride and dilation, and err in gradients of others; its
    # float32 kernels crash for some dilated windows that are larger than the input.
    dtypes = {operand.dtype for operand in operands if operand is not None}
    dilated = options.get("dilation", 1) not in (1, (1, 1, 1))
    crashes = torch.bfloat16 in dtypes or (dilated and torch.float32 in dtypes)
    with torch.backends.mkldnn.flags(enabled=False) if crashes else nullcontext():
        compare(name, operands, options)


def compare(name, operands, options):
    note(f"{name}: {[None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in operands]} {options}")
    tried[name][0] += 1
    expected, expected_error = outcome(getattr(F, name), operands, options)
    got, error = outcome(getattr(pyvolconv, name), operands, options)
    if expected_error is not None:
        tried[name][1] += 1
        assert type(error) is type(expected_error)
        assert words(error) == words(expected_error)
        return
    if error is not None:
        raise error
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 5e-2}.get(got.dtype, 1e-5)
    wanted = [operand for operand in operands if operand is not None and operand.requires_grad]
    assert got.requires_grad == expected.requires_grad == bool(wanted)
    reference, leaves = expected, wanted
    if got.dtype in (torch.float16, torch.bfloat16) and got.numel():
        reference, leaves = exact(name, operands, options)
    torch.testing.assert_close(got, reference, rtol=tolerance, atol=tolerance * 10, check_dtype=False)
    if wanted:
        cotangent = torch.randn(got.shape).to(got.dtype)
        gradients, gradient_error = outcome(torch.autograd.grad, (got, wanted, cotangent), {})
        theirs, their_error = outcome(torch.autograd.grad, (reference, leaves, cotangent.to(reference.dtype)), {})
        if their_error is None:
            assert gradient_error is None
            assert [gradient.dtype for gradient in gradients] == [operand.dtype for operand in wanted]
            torch.testing.assert_close(gradients, theirs, rtol=tolerance, atol=tolerance * 30, check_dtype=False)


@given(calls(transposed=False))
def test_conv3d(call):
    check("conv3d", *call)


@given(calls(transposed=True))
def test_conv_transpose3d(call):
    check("conv_transpose3d", *call)


@pytest.mark.parametrize("name", tried)
def test_enough_was_tried_of_both_kinds(name, record_property):
    """Says how many calls the tests above made, and that neither results nor errors were too few."""
    calls, errors = tried[name]
    if calls == 0:
        pytest.skip("the tests above did not run in this process")
    record_property("calls", calls)
    print(f"{name}: {calls} calls, {errors} of them wrong")
    assert calls >= 100
    assert calls / 10 < errors < calls * 9 / 10
