"""PyTorch's own samples and error inputs for conv3d and conv_transpose3d: all of them, every dtype they list."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import settings
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

import pyvolconv


def _op_db():
    """PyTorch's list; importing it changes hypothesis' settings and locks torch's flags for the whole process."""
    hypothesis_settings = settings.default
    torch_backends = torch.backends.disable_global_flags.__globals__
    may_set_flags = torch_backends["__allow_nonbracketed_mutation_flag"]
    from torch.testing._internal.common_methods_invocations import op_db

    settings.register_profile("before_pytorch", parent=hypothesis_settings)
    settings.load_profile("before_pytorch")
    torch_backends["__allow_nonbracketed_mutation_flag"] = may_set_flags
    return op_db


FUNCTIONS = {
    "nn.functional.conv3d": pyvolconv.conv3d,
    "nn.functional.conv_transpose3d": pyvolconv.conv_transpose3d,
}
OPINFOS = {opinfo.name: opinfo for opinfo in _op_db() if opinfo.name in FUNCTIONS}
CELLS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
    for name, opinfo in OPINFOS.items()
    for dtype in sorted(opinfo.supported_dtypes("cpu"), key=str)
]
# What PyTorch's tests of these two allow (tolerance overrides of the OpInfos); the rest is exact or the default.
TOLERANCE = {
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
    torch.float32: {"rtol": 1.3e-5, "atol": 5e-5},
    torch.complex64: {"rtol": 1.3e-5, "atol": 5e-5},
}


def samples(name, dtype, requires_grad=False):
    several = list(OPINFOS[name].sample_inputs("cpu", dtype, requires_grad=requires_grad))
    several += list(OPINFOS[name].reference_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(several) >= 20, "PyTorch lists 20 samples of conv3d and 10 of conv_transpose3d, each of them twice"
    return several


def assert_close(got, expected, dtype):
    """Within PyTorch's tolerance; of float32 and narrower relative to the largest value too.

    With bfloat16 instructions torch's own two kernels for one sum (a transposed convolution, a gradient) round the
    products of a sum differently, and where products cancel the difference is large beside the result.
    """
    tolerance = dict(TOLERANCE.get(dtype, {}))
    if dtype in (torch.float16, torch.bfloat16) and expected.numel():
        tolerance["atol"] *= max(1.0, float(expected.abs().max()))
    if dtype == torch.float32 and expected.numel():
        # Winograd's error is a few units of the largest value, not of each (docs/performance.md).
        tolerance["atol"] = max(tolerance["atol"], 8 * torch.finfo(dtype).eps * float(expected.abs().max()))
    torch.testing.assert_close(got, expected, **tolerance)


def differentiable(sample):
    return [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor) and t.requires_grad]


def test_both_functions_are_listed_with_all_kinds_of_numbers():
    assert set(OPINFOS) == set(FUNCTIONS)
    for opinfo in OPINFOS.values():
        listed = opinfo.supported_dtypes("cpu")
        assert {torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.int64} <= set(listed)


@pytest.mark.parametrize(("name", "dtype"), CELLS)
def test_results(name, dtype):
    for sample in samples(name, dtype):
        got = FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs)
        expected = OPINFOS[name].op(sample.input, *sample.args, **sample.kwargs)
        assert_close(got, expected, dtype)


DIFFERENTIABLE = [cell for cell in CELLS if cell.values[1].is_floating_point or cell.values[1].is_complex]


@pytest.mark.parametrize(("name", "dtype"), DIFFERENTIABLE)
def test_gradients(name, dtype):
    for sample in samples(name, dtype, requires_grad=True):
        inputs = differentiable(sample)
        assert len(inputs) >= 2
        got = FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs)
        expected = OPINFOS[name].op(sample.input, *sample.args, **sample.kwargs)
        cotangent = torch.randn_like(expected)
        pairs = zip(
            torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
        )
        for gradient, theirs in pairs:
            assert_close(gradient, theirs, dtype)


def functions(name, sample):
    """(ours, theirs) of the sample's tensors alone, and those tensors."""
    tensors = [sample.input, *(arg for arg in sample.args if isinstance(arg, torch.Tensor))]
    rest = sample.args[len(tensors) - 1 :]
    pair = [lambda *args, f=f: f(*args, *rest, **sample.kwargs) for f in (FUNCTIONS[name], OPINFOS[name].op)]
    return *pair, [tensor.detach() for tensor in tensors]


@pytest.mark.parametrize(("name", "dtype"), DIFFERENTIABLE)
def test_forward_mode(name, dtype):
    for sample in samples(name, dtype):
        ours, theirs, tensors = functions(name, sample)
        tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
        pairs = zip(jvp(ours, tuple(tensors), tangents), jvp(theirs, tuple(tensors), tangents), strict=True)
        for got, expected in pairs:
            assert_close(got, expected, dtype)


@pytest.mark.parametrize(("name", "dtype"), DIFFERENTIABLE)
def test_second_derivatives(name, dtype):
    for sample in samples(name, dtype):
        ours, theirs, tensors = functions(name, sample)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        cotangent = torch.randn_like(theirs(*leaves)).detach().requires_grad_()
        seconds = [torch.randn_like(leaf) for leaf in leaves]
        results = []
        for function in (ours, theirs):
            first = torch.autograd.grad(function(*leaves), leaves, cotangent, create_graph=True)
            with_graph = [(one, second) for one, second in zip(first, seconds, strict=True) if one.requires_grad]
            several, cotangents = zip(*with_graph, strict=True)
            # The gradients of empty operands do not depend on anything.
            results.append(torch.autograd.grad(several, [cotangent, *leaves[:2]], cotangents, allow_unused=True))
        for got, expected in zip(*results, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                assert_close(got, expected, dtype)


@pytest.mark.parametrize(("name", "dtype"), CELLS)
def test_vmap(name, dtype):
    """Over each operand alone, and over all."""
    for sample in samples(name, dtype):
        ours, theirs, tensors = functions(name, sample)
        for mapped in [*({number} for number in range(len(tensors))), set(range(len(tensors)))]:
            in_dims = tuple(0 if number in mapped else None for number in range(len(tensors)))
            several = [
                torch.stack([tensor, tensor.flip(0), tensor]) if number in mapped else tensor
                for number, tensor in enumerate(tensors)
            ]
            assert_close(vmap(ours, in_dims)(*several), vmap(theirs, in_dims)(*several), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.complex128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, dtype):
    """As PyTorch's own test_ops_gradients runs it: reverse, forward and forward over reverse."""
    for sample in OPINFOS[name].sample_inputs("cpu", dtype, requires_grad=True):
        inputs = differentiable(sample)

        def function(*tensors, sample=sample):
            return FUNCTIONS[name](*tensors, *sample.args[len(tensors) - 1 :], **sample.kwargs)

        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_inputs(name):
    """The class and a message that PyTorch's pattern matches; and where torch's own words are at hand, those."""
    errors = list(OPINFOS[name].error_inputs("cpu")) if OPINFOS[name].error_inputs_func else []
    assert len(errors) >= (10 if name == "nn.functional.conv3d" else 0)
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex) as raised:
            FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(error.error_type) as expected:
            OPINFOS[name].op(sample.input, *sample.args, **sample.kwargs)
        assert str(raised.value) == str(expected.value)
        assert re.search(error.error_regex, str(raised.value))
