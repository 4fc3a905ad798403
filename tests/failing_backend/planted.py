"""A backend that fails where it is told to, with part of the work done, and models that run it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyvolconv.backends.cpp import CppDirect

BROKEN = 6
"""Output channels of the convolution that fails, which no other one has."""


class PlantedError(RuntimeError):
    """What the planted backend raises unless it is told otherwise."""


class Planted(CppDirect):
    """cpp.direct, preferred to everything else, that raises `error` after a pass of one layer was computed."""

    name = family = "planted"

    def __init__(self):
        self.pass_, self.error, self.spared = None, None, 0

    def break_(self, pass_, error=None, spared=0):
        """Fail in `pass_` of the broken layer, after so many calls that go well."""
        self.pass_, self.error, self.spared = pass_, error or PlantedError("in the middle"), spared

    def mend(self):
        self.pass_ = None

    def expected_efficiency(self, problem, pass_):
        return 100.0

    def _fail_if_told(self, problem, pass_):
        if pass_ == self.pass_ and problem.out_channels == BROKEN:
            self.spared -= 1
            if self.spared < 0:
                raise self.error

    def forward(self, problem, *args):
        result = super().forward(problem, *args)
        self._fail_if_told(problem, "forward")
        return result

    def grad_input(self, problem, *args):
        result = super().grad_input(problem, *args)
        self._fail_if_told(problem, "grad_input")
        return result

    def grad_weight(self, problem, *args):
        result = super().grad_weight(problem, *args)
        self._fail_if_told(problem, "grad_weight")
        return result

    def _max_pool(self, problem, *tensors):
        super()._max_pool(problem, *tensors)
        self._fail_if_told(problem, "forward")

    def grad_input_max_pool(self, problem, *args):
        result = super().grad_input_max_pool(problem, *args)
        self._fail_if_told(problem, "grad_input")
        return result

    def grad_weight_max_pool(self, problem, *args):
        result = super().grad_weight_max_pool(problem, *args)
        self._fail_if_told(problem, "grad_weight")
        return result


def plain_model():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.SiLU(),
        nn.Conv3d(4, BROKEN, 3, stride=2),
        nn.Dropout(0.5),
        nn.Conv3d(BROKEN, 3, 1, bias=False),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


def pooled_model():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.SiLU(),
        nn.Sequential(nn.Conv3d(4, BROKEN, 3), nn.ReLU(), nn.MaxPool3d(2)),
        nn.Conv3d(BROKEN, 3, 1, bias=False),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


def transposed_model():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ConvTranspose3d(4, 5, 2, stride=2),
        nn.Conv3d(5, BROKEN, 3, stride=2),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


MODELS = {"plain": plain_model, "pooled": pooled_model, "transposed": transposed_model}


def example():
    return torch.randn(2, 1, 6, 6, 6)


def built(name):
    """A model with its lazy layer made, and with gradients of an earlier step."""
    model = MODELS[name]()
    step(model, example())
    return model


def broken_layer(model):
    (layer,) = (one for one in model.modules() if isinstance(one, nn.Conv3d) and one.out_channels == BROKEN)
    return layer


def step(model, x):
    torch.manual_seed(7)
    model(x).square().sum().backward()


def snapshot(model):
    """Everything a user sees of a model, by value and by identity."""
    return {
        "classes": [(module, type(module), type(module).__bases__) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "parameters": [(name, id(one), one._version, one.tolist()) for name, one in model.named_parameters()],
        "buffers": [(name, id(one), one.tolist()) for name, one in model.named_buffers()],
        "gradients": gradients(model),
        "random": torch.get_rng_state().tolist(),
    }


def gradients(model):
    return {
        name: None if one.grad is None else copy.deepcopy(one.grad).tolist() for name, one in model.named_parameters()
    }
