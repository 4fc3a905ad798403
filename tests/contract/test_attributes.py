"""What a layer says about itself, and what it does when its attributes are set after construction."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import pyvolconv

from .layers import assert_same_outcome, is_ours, outcome, pair


def test_constructor_takes_the_same_arguments(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert type(ours).__constants__ == type(theirs).__constants__
    assert type(ours).__name__ == type(theirs).__name__
    positional = (4, 6, 3, 2, 1, 1, 2, False, 2) if "Transpose" in name else (4, 6, 3, 2, 1, 2, 2, False, "circular")
    again = type(ours)(*positional, device="cpu", dtype=torch.float64)
    assert is_ours(again)
    assert repr(again) == repr(type(theirs)(*positional))
    assert again.weight.dtype == torch.float64


def test_an_accelerated_module_has_torchs_names_and_attributes(name):
    ours, theirs = pair("accelerated", name, 4, 6, 3, padding=1)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    for attribute in vars(theirs).keys() - {"_parameters"}:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(ours), attribute) == getattr(type(theirs), attribute)
    assert inspect.getsource(type(ours)) == inspect.getsource(type(theirs))


def test_only_the_exact_type_is_another(kind, name):
    """Code that asks for the exact class, as quantization's tables do, needs `revert` first."""
    ours, theirs = pair(kind, name, 4, 6, 3)
    assert isinstance(ours, type(theirs))
    assert type(ours) is not type(theirs)
    assert (type(pyvolconv.revert(ours)) is type(theirs)) == (kind == "accelerated")


CHANGED = [
    ("stride", (2, 1, 2)),
    ("stride", [2, 2, 2]),
    ("stride", 2),
    ("padding", (0, 1, 2)),
    ("padding", [1, 1, 1]),
    ("padding", 2),
    ("padding", "same"),
    ("padding", "valid"),
    ("dilation", 2),
    ("dilation", (1, 2, 1)),
    ("groups", 1),
    ("bias", None),
    ("output_padding", (1, 0, 1)),
    ("output_padding", 1),
    ("kernel_size", 9),
    ("padding_mode", "circular"),
    ("transposed", True),
    ("in_channels", 9),
    ("stride", torch.Size((1, 1, 2))),
    ("padding", torch.tensor(1)),
]


@pytest.mark.parametrize(("attribute", "value"), CHANGED, ids=str)
def test_attributes_set_later_are_obeyed_as_by_torch(kind, name, attribute, value):
    ours, theirs = pair(kind, name, 4, 6, 3)
    for module in (ours, theirs):
        setattr(module, attribute, value)
    assert_same_outcome(outcome(repr, ours), outcome(repr, theirs))
    x = torch.randn(2, 4, 5, 6, 7)
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))


def test_reset_parameters_draws_torchs_numbers(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    for module in (ours, theirs):
        torch.manual_seed(11)
        module.reset_parameters()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    torch.manual_seed(11)
    fresh = type(theirs)(4, 6, 3)
    assert torch.equal(ours.weight, fresh.weight)


def test_defaults_of_dtype_and_device_are_obeyed(kind, name):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        ours, theirs = pair(kind, name, 4, 6, 3)
        x = torch.randn(1, 4, 5, 5, 5)
        assert ours.weight.dtype == torch.float64
        assert_same_outcome(outcome(ours, x), outcome(theirs, x))
        narrow = outcome(ours.float(), x.float()), outcome(theirs.float(), x.float())
        assert_same_outcome(*narrow)
        assert narrow[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert type(ours)(4, 6, 3).weight.is_meta
        assert ours(x.float()).device.type == "cpu"


def test_skip_init_and_to_empty(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    blank = nn.utils.skip_init(type(ours), 4, 6, 3)
    assert is_ours(blank)
    blank.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 5, 5, 5)
    assert_same_outcome(blank(x), theirs(x))
    moved = ours.to("meta").to_empty(device="cpu")
    moved.load_state_dict(theirs.state_dict())
    assert_same_outcome(moved(x), theirs(x))
