"""`BatchNorm3d`: what torch's does, running statistics and refusals included."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pyvolconv

from ..closeness import assert_close
from ..contract.layers import assert_same_outcome, outcome, used_strides
from ..instance_norm.operands import LAYOUTS, compiled

pytestmark = [compiled, pytest.mark.usefixtures("at_any_size")]

OPTIONS = (
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)


def pair(channels=6, **options):
    """torch's module and ours in the same state, none of it trivial."""
    theirs, ours = nn.BatchNorm3d(channels, **options), pyvolconv.BatchNorm3d(channels, **options)
    with torch.no_grad():
        for value in (*theirs.parameters(), *(one for one in theirs.buffers() if one.dim())):
            value.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_torch(options, dtype, layout, calls):
    """Results, gradients, strides and every buffer after several batches, one of them in eval mode."""
    theirs, ours = (one.to(dtype) for one in pair(**options))
    for number, samples in enumerate((3, 1, 2, 4)):
        for module in (theirs, ours):
            module.train(number != 2)
        x = (5 * torch.randn(samples, 6, 4, 5, 6, dtype=dtype) - 2).to(memory_format=LAYOUTS[layout])
        both = [x.clone().requires_grad_() for _ in range(2)]
        expected, y = theirs(both[0]), ours(both[1])
        grad = torch.randn(x.shape, dtype=dtype).to(memory_format=LAYOUTS[layout])
        for result in (expected, y):
            result.backward(grad)
        assert_close(y, expected)
        assert y.stride() == expected.stride()
        assert_close(both[1].grad, both[0].grad)
        assert used_strides(both[1].grad) == used_strides(both[0].grad)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(one.grad, other.grad)
        assert_close(ours.state_dict(), theirs.state_dict())
    by_batch = 4 if options.get("track_running_stats") is False else 3
    assert len(calls) == by_batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_layouts_are_the_same(layout):
    for channels, size in ((1, (4, 4, 4)), (6, (1, 1, 1))):
        theirs, ours = pair(channels)
        x = torch.randn(3, channels, *size).to(memory_format=LAYOUTS[layout])
        expected, y = theirs(x), ours(x)
        assert_close(y, expected)
        assert y.stride() == expected.stride()


REFUSED = {
    "one value per channel": lambda: torch.randn(1, 6, 1, 1, 1),
    "no sample": lambda: torch.randn(0, 6, 3, 3, 3),
    "four axes": lambda: torch.randn(6, 3, 3, 3),
    "other channels": lambda: torch.randn(2, 5, 3, 3, 3),
    "other dtype": lambda: torch.randn(2, 6, 3, 3, 3).double(),
    "integers": lambda: torch.ones(2, 6, 3, 3, 3, dtype=torch.int64),
    "no tensor": lambda: [1.0],
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
def test_refused_in_the_same_words(what, options):
    theirs, ours = pair(**options)
    x = REFUSED[what]()
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))
    assert_close(ours.state_dict(), theirs.state_dict())


def test_odd_states_are_torchs():
    """Buffers that somebody removed or replaced."""

    def without_count(module):
        module.num_batches_tracked = None

    def without_mean(module):
        module.running_mean = None

    def without_any(module):
        module.running_mean = module.running_var = None

    def not_dense(module):
        module.running_mean = torch.randn(12).abs()[::2]

    def of_other_size(module):
        module.running_var = torch.ones(4)

    def wide(module):
        module.running_mean, module.running_var = torch.ones(6).double(), torch.ones(6).double()

    def does_not_track(module):
        module.track_running_stats = False

    for change in (without_count, without_mean, without_any, not_dense, of_other_size, wide, does_not_track):
        for momentum in (0.3, None):
            theirs, ours = pair(momentum=momentum)
            x = torch.randn(3, 6, 4, 5, 6)
            torch.manual_seed(0)
            change(theirs)
            torch.manual_seed(0)
            change(ours)
            for _ in range(2):
                assert_same_outcome(outcome(ours, x), outcome(theirs, x))
            buffers = [{k: v for k, v in one._buffers.items() if v is not None} for one in (ours, theirs)]
            assert_close(*buffers)


@pytest.mark.parametrize("eps", [0.0, -1.0, 1, "1", None])
def test_eps_that_torch_refuses(eps):
    theirs, ours = pair()
    theirs.eps = ours.eps = eps
    x = torch.randn(3, 6, 4, 5, 6)
    assert_same_outcome(outcome(ours, x), outcome(theirs, x))


def test_a_subclass_that_checks_its_input():
    class Picky(nn.BatchNorm3d):
        def _check_input_dim(self, input):
            super()._check_input_dim(input)
            if input.shape[2] < 5:
                raise ValueError("too thin")

    ours = pyvolconv.accelerate(Picky(6))
    ours(torch.randn(3, 6, 5, 5, 6))
    with pytest.raises(ValueError, match="too thin"):
        ours(torch.randn(3, 6, 4, 5, 6))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_that_are_not_finite_or_whose_squares_are_not(dtype, layout):
    theirs, ours = (one.to(dtype) for one in pair(5))
    for _ in range(3):
        x = torch.randn(4, 5, 3, 4, 5, dtype=dtype)
        x[0, 0, 0, 0, 0] = float("inf")
        x[1, 1, 1, 1, 1] = -float("inf")
        x[0, 2, 0, 0, 0] = float("nan")
        if dtype == torch.float64:  # whose squares overflow; those of float32 are summed in float64 here
            x[2, 3, 2, 2, 2] = 1e299
        x = x.to(memory_format=LAYOUTS[layout])
        assert_close(ours(x), theirs(x), equal_nan=True)
        for name, value in theirs.state_dict().items():
            got = ours.state_dict()[name]
            assert_close(list(got) if value.dim() else got, list(value) if value.dim() else value, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_exported_for_any_size(options, monkeypatch):
    """What is faster at one size decides nothing for others."""
    monkeypatch.undo()
    _, ours = pair(4, **options)
    sizes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    for example, other in (((2, 4, 8, 8, 8), (4, 4, 50, 50, 50)), ((4, 4, 50, 50, 50), (2, 4, 8, 8, 50))):
        program = torch.export.export(ours, (torch.randn(*example[:4], other[4]),), dynamic_shapes=sizes)
        assert program.module()(torch.randn(other)).shape == other


def test_versions_of_running_statistics_stay():
    """As with torch, a graph that saved them may run backward after another batch."""
    for module in pair():
        scale = torch.ones(6, requires_grad=True)
        folded = (scale * module.running_var * module.running_mean).sum()
        before = module.running_var.clone()
        module(torch.randn(3, 6, 4, 5, 6))
        assert not torch.equal(module.running_var, before)
        assert module.running_mean._version == module.running_var._version
        folded.backward()


def test_frozen_parameters_and_inputs(calls):
    x = torch.randn(3, 6, 4, 5, 6)
    for frozen in (("weight", "bias"), ("bias",), ()):
        theirs, ours = pair()
        for module in (theirs, ours):
            for name in frozen:
                getattr(module, name).requires_grad_(False)
        given = x.clone().requires_grad_(len(frozen) == 2)
        results = []
        for module in (theirs, ours):
            leaves = [one for one in (given, module.weight, module.bias) if one.requires_grad]
            results.append(torch.autograd.grad(module(given).square().sum(), leaves))
        assert_close(results[1], results[0])
    with torch.no_grad():
        assert not ours(x).requires_grad
    with torch.inference_mode():
        assert ours(x).is_inference()
    assert len(calls) == 5


def test_copied_pickled_and_described():
    theirs, ours = pair(eps=0.5)
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, 6, 4, 5, 6)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is pyvolconv.BatchNorm3d
        assert_close(other(x), copy.deepcopy(theirs)(x))


def test_small_calls_are_torchs(calls, monkeypatch):
    monkeypatch.undo()
    ours = pyvolconv.BatchNorm3d(16)
    for layout in LAYOUTS.values():
        ours(torch.randn(2, 16, 8, 16, 16).to(memory_format=layout))
    assert not calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_calls_are_ours(calls, monkeypatch, layout):
    monkeypatch.undo()
    theirs, ours = pair(16)
    seen = []
    monkeypatch.setattr("pyvolconv.batch_norm.batch_norm_activation", lambda *rest, **named: seen.append(rest))
    x = torch.randn(4, 16, 16, 16, 33).to(memory_format=LAYOUTS[layout])
    assert_close(ours(x), theirs(x))
    assert len(seen) == 1
