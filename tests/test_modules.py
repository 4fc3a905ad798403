"""Conv3d and ConvTranspose3d beside torch's: attributes, repr, state_dict, results, errors, subclasses."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn

import pyvolconv

from .closeness import assert_close

CONV = [
    {"kernel_size": 3},
    {"kernel_size": (1, 2, 3), "stride": 2, "padding": (0, 1, 2), "dilation": (1, 2, 1), "groups": 2, "bias": False},
    {"kernel_size": [3, 3, 3], "stride": [1, 2, 1], "padding": [1, 1, 1], "dilation": [1, 1, 1]},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 4, 3), "padding": "same", "dilation": (1, 1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    *(
        {"kernel_size": (3, 2, 3), "padding": (1, 0, 2), "padding_mode": mode}
        for mode in ("reflect", "replicate", "circular")
    ),
    {"kernel_size": (2, 3, 4), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 1, "dtype": torch.float64},
]
TRANSPOSED = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": (3, 2, 3), "stride": (2, 1, 3), "padding": (1, 0, 2), "output_padding": (1, 0, 2), "bias": False},
    {"kernel_size": [3, 3, 3], "stride": [2, 2, 2], "padding": [1, 1, 1], "groups": 2},
    {"kernel_size": 2, "dilation": (3, 1, 2), "output_padding": (2, 0, 1)},
]
CASES = [pytest.param("Conv3d", options, id=f"Conv3d-{number}") for number, options in enumerate(CONV)]
CASES += [pytest.param("ConvTranspose3d", options, id=f"ConvTranspose3d-{n}") for n, options in enumerate(TRANSPOSED)]


def pair(name, options, channels=4):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = getattr(pyvolconv, name)(channels, 6, **options)
        theirs = getattr(nn, name)(channels, 6, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize(("name", "options"), CASES)
def test_attributes_and_repr(name, options):
    ours, theirs = pair(name, options)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    hidden = {"_parameters", "_buffers", "_modules"}
    assert set(vars(ours)) == set(vars(theirs))
    for attribute in set(vars(ours)) - hidden:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("kernel_size", "stride", "dilation", "output_padding"):
        assert isinstance(getattr(ours, attribute), tuple)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize(("name", "options"), CASES)
def test_initial_values_are_those_of_torch(name, options):
    torch.manual_seed(5)
    ours = getattr(pyvolconv, name)(4, 6, **options)
    torch.manual_seed(5)
    theirs = getattr(nn, name)(4, 6, **options)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_results_and_gradients(name, options, unbatched):
    ours, theirs = pair(name, options)
    shape = (4, 5, 6, 7) if unbatched else (2, 4, 5, 6, 7)
    x = torch.randn(shape, dtype=options.get("dtype", torch.float32))
    y, expected = ours(x), theirs(x)
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_transposed_output_size():
    ours, theirs = pair("ConvTranspose3d", {"kernel_size": 3, "stride": 2, "padding": 1})
    x = torch.randn(1, 4, 3, 4, 5)
    for size in ([5, 7, 9], [6, 8, 10], [6, 7, 10], torch.Size([1, 6, 6, 8, 9])):
        assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    for wrong in ([7, 8, 10], [5, 7]):
        with pytest.raises(ValueError, match="output") as expected:
            theirs(x, output_size=wrong)
        with pytest.raises(ValueError, match="output") as raised:
            ours(x, output_size=wrong)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Conv3d", {"kernel_size": 3, "groups": 3}),
        ("Conv3d", {"kernel_size": 3, "groups": 0}),
        ("Conv3d", {"kernel_size": 3, "padding": "full"}),
        ("Conv3d", {"kernel_size": 3, "padding": "same", "stride": 2}),
        ("Conv3d", {"kernel_size": 3, "padding_mode": "mirror"}),
        ("Conv3d", {}),
        ("ConvTranspose3d", {"kernel_size": 3, "padding_mode": "reflect"}),
        ("ConvTranspose3d", {"kernel_size": 3, "groups": 4}),
    ],
)
def test_constructor_refuses_what_torch_refuses(name, options):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises is what is compared
        getattr(nn, name)(4, 6, **options)
    with pytest.raises(type(expected.value)) as raised:
        getattr(pyvolconv, name)(4, 6, **options)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("name", ["Conv3d", "ConvTranspose3d"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 3, 5, 6, 7), (1, 4, 0, 6, 7), (1, 1, 4, 5, 6, 7)])
def test_call_refuses_what_torch_refuses(name, shape):
    ours, theirs = pair(name, {"kernel_size": 3})
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises is what is compared
        theirs(torch.randn(shape))
    with pytest.raises(type(expected.value)) as raised:
        ours(torch.randn(shape))
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_copies(name, options):
    ours, _ = pair(name, options)
    x = torch.randn(1, 4, 5, 6, 7, dtype=options.get("dtype", torch.float32))
    expected = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert torch.equal(other(x), expected)


def test_a_subclass_of_ours():
    class Causal(pyvolconv.Conv3d):
        """Pads time on one side, as video models do: sets self.padding aside and calls super().forward."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            depth, height, width = self.padding
            self._causal = (width, width, height, height, 2 * depth, 0)
            self.padding = (0, 0, 0)

        def forward(self, x):
            return super().forward(nn.functional.pad(x, self._causal))

    layer = Causal(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 6, 7)
    expected = nn.functional.conv3d(nn.functional.pad(x, (1, 1, 1, 1, 2, 0)), layer.weight, layer.bias)
    assert_close(layer(x), expected)


def test_moves_between_dtypes_and_layouts():
    ours, theirs = pair("Conv3d", {"kernel_size": 3, "padding": 1})
    x = torch.randn(2, 4, 5, 6, 7)
    for module in (ours, theirs):
        module.to(memory_format=torch.channels_last_3d)
    assert ours(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(ours(x), theirs(x))
    assert_close(ours.double()(x.double()), theirs.double()(x.double()))
    assert ours.to("meta")(x.double().to("meta")).shape == (2, 6, 5, 6, 7)


def test_runs_on_the_forced_backend(backend):
    layer = pyvolconv.Conv3d(4, 6, 3, padding=1, dtype=torch.complex64)
    if not backend.ours:
        return
    with pyvolconv.use_backend(backend.name), pytest.raises(pyvolconv.UnsupportedProblemError, match=backend.name):
        layer(torch.randn(1, 4, 5, 5, 5, dtype=torch.complex64))


class Watching(torch.Tensor):
    """A user's tensor that sees each function it is given to."""

    seen: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_tensor_subclasses_see_the_functions():
    x, weight = torch.randn(1, 2, 4, 4, 4), torch.randn(2, 2, 2, 2, 2)
    for function in (pyvolconv.conv3d, pyvolconv.conv_transpose3d):
        Watching.seen.clear()
        y = function(x.as_subclass(Watching), weight, padding=1)
        assert Watching.seen == [function]
        assert type(y) is Watching
        expected = getattr(nn.functional, function.__name__)(x, weight, padding=1)
        assert_close(y.as_subclass(torch.Tensor), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_opaque_layouts_are_left_to_torch():
    x, weight = torch.randn(1, 2, 4, 4, 4), torch.randn(3, 2, 2, 2, 2)
    y = pyvolconv.conv3d(x.to_mkldnn(), weight.to_mkldnn())
    assert_close(y.to_dense(), nn.functional.conv3d(x, weight))
