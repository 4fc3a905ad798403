"""A step captured as a graph does what the step does, from its first call on."""

import pytest
import torch
from torch import nn

from pyvolconv.train.graphed import WARM_UP_STEPS, GraphedStep
from pyvolconv.train.loop import make_optimizer, training_step

from .closeness import assert_close


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    return model, make_optimizer(model, learning_rate=1e-2), torch.randn(4, 3, 4), torch.arange(4) % 2


@pytest.mark.parametrize("calls", [1, 3])
def test_warm_up_and_capture_leave_no_trace(calls):
    model, optimizer, x, y = make()
    for _ in range(calls):
        training_step(model, optimizer, x, y)
    other, other_optimizer, _, _ = make()
    ran = []

    def step():
        ran.append(len(ran))
        training_step(other, other_optimizer, x, y)

    def warm_up(function):
        for _ in range(WARM_UP_STEPS):
            function()

    captures = []

    def capture(function):
        # Gradients of the warm-up would be added to in every replay.
        captures.append(all(parameter.grad is None for parameter in other.parameters()))
        function()
        return function

    graphed = GraphedStep(other, other_optimizer, step, warm_up, capture)
    assert not ran, "nothing runs before the first call"
    known = [parameter.data_ptr() for parameter in other.parameters()]
    for _ in range(calls):
        graphed()
    assert captures == [True]
    assert len(ran) == WARM_UP_STEPS + 1 + calls
    assert [parameter.data_ptr() for parameter in other.parameters()] == known
    for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert torch.equal(parameter.grad, expected.grad)
        for name, value in optimizer.state[expected].items():
            assert torch.equal(other_optimizer.state[parameter][name], value), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_cuda_graph_takes_the_same_steps():
    model, _, x, y = make()
    other, _, _, _ = make()
    model, other, x, y = model.cuda(), other.cuda(), x.cuda(), y.cuda()
    optimizer = make_optimizer(model, 1e-2, capturable=True)
    other_optimizer = make_optimizer(other, 1e-2, capturable=True)
    graphed = GraphedStep(other, other_optimizer, lambda: training_step(other, other_optimizer, x, y))
    for _ in range(3):
        training_step(model, optimizer, x, y)
        graphed()
    for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert_close(parameter, expected)
        assert_close(parameter.grad, expected.grad)
