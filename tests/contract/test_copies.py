"""Copies of a layer stay ours; what is written to a file is torch's, also where this package cannot be imported."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import pyvolconv

from ..closeness import assert_close
from .layers import assert_same_outcome, is_ours, outcome, pair

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda layer: copy.deepcopy(copy.copy(layer)),
    "deepcopy in a list": lambda layer: copy.deepcopy([layer, layer])[1],
}


class Forgetful(nn.Conv3d):
    """A user's subclass that keeps what cannot be copied, and leaves it out of its state."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stream = (number for number in range(3))

    def __getstate__(self):
        return {**self.__dict__, "stream": None}


class Copier(nn.Conv3d):
    """A user's subclass that says itself what its copies are."""

    def __copy__(self):
        return "a copy"

    def __deepcopy__(self, memo):
        return "a deep copy"


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_of_the_same_class_and_compute_the_same(kind, name, way):
    ours, theirs = pair(kind, name, 4, 6, 3, padding=1)
    ours.note = theirs.note = ["mine"]
    mine, other = COPIES[way](ours), COPIES[way](theirs)
    assert type(mine) is type(ours)
    assert vars(mine).keys() == vars(other).keys()
    x = torch.randn(1, 4, 5, 5, 5)
    assert torch.equal(mine(x), ours(x))
    # A shallow copy shares its tensors and attributes, a deep one does not.
    for read in (lambda layer: layer.weight, lambda layer: layer.note):
        assert (read(mine) is read(ours)) == (read(other) is read(theirs))


@pytest.mark.parametrize("way", COPIES)
def test_the_state_that_a_subclass_gives_is_copied(way):
    layer = pyvolconv.accelerate(Forgetful(1, 2, 3))
    other = COPIES[way](layer)
    assert other.stream is None
    assert type(other) is type(layer)
    assert pickle.loads(pickle.dumps(layer)).stream is None


def test_the_copies_that_a_subclass_makes_are_left_to_it():
    layer = pyvolconv.accelerate(Copier(1, 2, 3))
    assert (copy.copy(layer), copy.deepcopy(layer)) == ("a copy", "a deep copy")


@pytest.mark.parametrize("accelerate_first", [False, True])
def test_copies_of_a_parametrized_layer(accelerate_first):
    theirs = weight_norm(nn.Conv3d(2, 3, 2))
    layer = nn.Conv3d(2, 3, 2)
    layer = weight_norm(pyvolconv.accelerate(layer)) if accelerate_first else pyvolconv.accelerate(weight_norm(layer))
    assert is_ours(copy.deepcopy(layer))
    assert_same_outcome(outcome(copy.copy, layer), outcome(copy.copy, theirs))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(kind, name, protocol):
    ours, theirs = pair(kind, name, 4, 6, 3)
    other = pickle.loads(pickle.dumps(ours, protocol))
    assert type(other) is (type(theirs) if kind == "accelerated" else type(ours))
    assert vars(other).keys() == vars(theirs).keys()
    x = torch.randn(1, 4, 5, 5, 5)
    assert_close(other(x), theirs(x))


USERS_MODULE = """
import torch
from torch import nn

class Causal(nn.Conv3d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1, 2, 0)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2))
        self.causal = Causal(4, 4, 3)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ConvTranspose3d(4, 2, 2, 2)
        self.norm = nn.InstanceNorm3d(2)

    def forward(self, x):
        return self.norm(self.up(self.pool(self.act(self.causal(self.stem(x))))))
"""
LOADER = """
import sys
sys.modules["pyvolconv"] = None  # importing it raises ImportError
import io, pickle, torch
folder, = sys.argv[1:]
sys.path.insert(0, folder)
torch.set_num_threads(1)
x, expected = torch.load(f"{folder}/example")
for model in (torch.load(f"{folder}/saved", weights_only=False), pickle.load(open(f"{folder}/pickled", "rb"))):
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    print(*sorted({type(module).__module__ for module in model.modules()}))
"""


def test_a_pickled_accelerated_model_loads_where_this_package_is_not(tmp_path, monkeypatch):
    (tmp_path / "users_module.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    users_module = importlib.import_module("users_module")
    monkeypatch.setitem(sys.modules, "users_module", users_module)
    model, x = users_module.Net().eval(), torch.randn(1, 2, 8, 8, 8)
    expected = model(x).detach()
    classes = {type(module).__module__ for module in model.modules()}
    pyvolconv.accelerate(model)
    assert "one pass" in str(pyvolconv.fusion_report(model)), "chains are part of what is written"
    torch.save((x, expected), tmp_path / "example")
    torch.save(model, tmp_path / "saved")
    (tmp_path / "pickled").write_bytes(pickle.dumps(model))
    assert is_ours(model.up), "writing must not change what is written"
    done = subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" ".join(sorted(classes))] * 2


def test_a_whole_model_with_weights_only_is_saved_reverted():
    """A difference: torch's restricted unpickler takes no class but by the opcode that pickle denies to ours."""
    layer = pyvolconv.accelerate(nn.Conv3d(1, 2, 3))

    def written_and_read():
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        with torch.serialization.safe_globals([nn.Conv3d, set]):
            return torch.load(file, weights_only=True)

    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        written_and_read()
    pyvolconv.revert(layer)
    assert torch.equal(written_and_read().weight, layer.weight)
