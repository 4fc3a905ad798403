"""Chains that `accelerate` leaves alone because the result could differ, and the reason that it gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyvolconv

from ..closeness import assert_close
from .models import Code, rows, small


def not_found(build, why):
    return pytest.param(build, why, id=why)


class SubclassedConv(nn.Conv3d):
    def forward(self, input):
        return super().forward(input) + 1


class SubclassedReLU(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


class SubclassedSequential(nn.Sequential):
    def forward(self, input):
        return super().forward(input) + 1


def hooked(model, index):
    model[index].register_forward_hook(lambda module, args, output: output + 1)
    return model


def tied():
    model = nn.Sequential(nn.Conv3d(3, 3, 1), nn.ReLU(), nn.Conv3d(3, 3, 1), nn.ReLU())
    model[2].weight = model[0].weight
    return model


def repeated():
    conv = nn.Conv3d(3, 3, 1)
    return nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU())


def parametrized():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU())
    torch.nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3)), "nothing follows"),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.Tanh()), "Tanh follows, which is no link of a chain"),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.SiLU()), "SiLU follows without a pool: no pass would be saved"
        ),
        not_found(lambda: hooked(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), 0), "Conv3d has hooks"),
        not_found(lambda: hooked(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), 1), "ReLU has hooks"),
        not_found(lambda: nn.Sequential(SubclassedConv(3, 4, 3), nn.ReLU()), "SubclassedConv is a subclass of Conv3d"),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), SubclassedReLU()), "SubclassedReLU is a subclass of ReLU"),
        not_found(parametrized, "ParametrizedConv3d is a subclass of Conv3d"),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()),
            "padding_mode='circular'",
        ),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.LeakyReLU(-0.5)), "LeakyReLU has negative_slope=-0.5"),
        not_found(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d(2, dilation=2)), "MaxPool3d has dilation=2"),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.MaxPool3d((7, 7, 6))),
            "MaxPool3d has a window of more than 255 voxels",
        ),
        not_found(
            lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4, track_running_stats=False)),
            "BatchNorm3d keeps no running statistics",
        ),
        not_found(tied, "stands in several places, or shares a parameter"),
        not_found(repeated, "stands in several places, or shares a parameter"),
        not_found(
            lambda: SubclassedSequential(nn.Conv3d(3, 4, 3), nn.ReLU()),
            "SubclassedSequential.forward forward() uses __class__ from around it",
        ),
    ],
)
def test_left_alone(build, why, passes):
    reference = build()
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert next(iter(rows(model).values()))[1] == why
    assert_close(model(small()), reference(small()))
    assert passes["fused"] == 0


def test_return_indices_is_left_alone(passes):
    reference = nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d(2, return_indices=True))
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert rows(model)["0"] == ("Conv3d alone", "MaxPool3d has return_indices=True")
    assert_close(model(small()), reference(small()))


LIST = []


def uses_intermediate(self, x):
    y = self.relu(self.conv(x))
    return self.pool(y) + y.mean()


def calls_twice(self, x):
    return self.pool(self.relu(self.conv(self.relu(self.conv(x)))))


def branches(self, x):
    return self.pool(self.relu(self.conv(x))) if x.mean() > 0 else x


def sets_attribute(self, x):
    self.calls += 1
    return self.pool(self.relu(self.conv(x)))


def appends(self, x):
    self.seen.append(1)
    return self.pool(self.relu(self.conv(x)))


def prints(self, x):
    print("forward")
    return self.pool(self.relu(self.conv(x)))


def draws(self, x):
    return self.pool(self.relu(self.conv(x))) * torch.rand(1)


def without_gradients(self, x):
    with torch.no_grad():
        return self.pool(self.relu(self.conv(x)))


def global_list(self, x):
    LIST.append(1)
    return self.pool(self.relu(self.conv(x)))


def reads_property(self, x):
    return self.pool(self.relu(self.conv(x))) * self.slope


def comprehends(self, x):
    return sum([layer(x) for layer in (self.conv, self.conv)])


def keywords(self, x, **options):
    return self.pool(self.relu(self.conv(x)))


def calls_forward(self, x):
    return self.pool(self.relu(self.conv.forward(x)))


def in_two_chains(self, x):
    return self.pool(self.relu(self.conv(x))) + self.conv(x).mean()


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (uses_intermediate, ""),
        (calls_twice, "Net.forward calls it 2 times"),
        (in_two_chains, "Net.forward calls it 2 times"),
        (branches, "Net.forward branches or loops on a value of its input"),
        (sets_attribute, "Net.forward sets_attribute() sets an attribute"),
        (appends, "Net.forward reads self.seen, which is no module, parameter or plain value"),
        (prints, "Net.forward prints() uses print"),
        (draws, "Net.forward calls rand without a tensor of its input"),
        (without_gradients, "Net.forward without_gradients() has a `with` block"),
        (global_list, "Net.forward global_list() uses LIST"),
        (reads_property, "Net.forward reads self.slope, a property"),
        (keywords, "Net.forward takes **options"),
        (calls_forward, "Net.forward reads self.conv.forward, which is no module, parameter or plain value"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forward_code_that_cannot_be_proven(forward, why, passes):
    reference = type("Net", (Code,), {"forward": forward})()
    model = pyvolconv.accelerate(copy.deepcopy(reference))
    assert rows(model)["conv"][1] == why
    torch.manual_seed(0)
    expected = reference(small())
    torch.manual_seed(0)
    assert_close(model(small()), expected)
    assert passes["fused"] == 0
