"""state_dict of a layer and what `load_state_dict` says to a wrong one: keys, metadata, words."""

from __future__ import annotations

import itertools

import pytest
import torch

from ..closeness import assert_close
from .layers import assert_same_outcome, outcome, pair

CHANGES = {
    "nothing": lambda state: state,
    "missing": lambda state: {},
    "unexpected": lambda state: {**state, "other": torch.zeros(1)},
    "shape": lambda state: {**state, "weight": torch.zeros(1)},
    "dtype": lambda state: {key: value.double() for key, value in state.items()},
    "layout": lambda state: {**state, "weight": state["weight"].to(memory_format=torch.channels_last_3d)},
    "no tensor": lambda state: {**state, "bias": 3},
}


def test_keys_values_and_metadata(kind, name):
    ours, theirs = pair(kind, name, 4, 6, 3)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert mine._metadata == other._metadata
    for key, value in mine.items():
        assert torch.equal(value, other[key])
        assert value.data_ptr() == getattr(ours, key).data_ptr()
    assert list(ours.state_dict(prefix="layer.", keep_vars=True).values()) == list(ours.parameters())


@pytest.mark.parametrize("change", CHANGES)
def test_loading(kind, name, change):
    for strict, assign in itertools.product([False, True], repeat=2):
        check_loading(kind, name, change, strict, assign)


def check_loading(kind, name, change, strict, assign):
    ours, theirs = pair(kind, name, 4, 6, 3)
    _, other = pair(kind, name, 4, 6, 3)
    state = CHANGES[change](other.state_dict())
    results = [outcome(layer.load_state_dict, state, strict=strict, assign=assign) for layer in (ours, theirs)]
    assert_same_outcome(*results)
    assert ours.weight.stride() == theirs.weight.stride()
    x = torch.randn(1, 4, 5, 5, 5)
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))
    if change == "nothing":
        assert_close(ours(x), other(x))


def test_hooks_of_the_state_are_called(kind, name):
    ours, _ = pair(kind, name, 4, 6, 3)
    seen = []
    ours.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    ours.register_state_dict_post_hook(lambda *_: seen.append("after saving"))
    ours.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    ours.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    ours.load_state_dict(ours.state_dict())
    assert seen == ["before saving", "after saving", "before loading", "after loading"]


def test_converted_at_once(kind, name):
    """`half`, `double`, `to`, `type`, `requires_grad_`, `share_memory` change parameters and nothing else."""
    ours, theirs = pair(kind, name, 4, 6, 3)
    x = torch.randn(1, 4, 5, 5, 5)
    for change in (
        lambda layer: layer.double(),
        lambda layer: layer.type(torch.float32),
        lambda layer: layer.to(memory_format=torch.channels_last_3d),
        lambda layer: layer.requires_grad_(False),
        lambda layer: layer.share_memory(),
    ):
        for layer in (ours, theirs):
            assert change(layer) is layer
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (mine.dtype, mine.stride(), mine.requires_grad) == (other.dtype, other.stride(), other.requires_grad)
            assert mine.is_shared() == other.is_shared()
        dtype = ours.weight.dtype
        assert_same_outcome(ours(x.to(dtype)), theirs(x.to(dtype)))
