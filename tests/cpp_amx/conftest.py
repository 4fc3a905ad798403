"""The passes, units and numbers of parts of `cpp.amx`."""

from __future__ import annotations

import pytest
import torch

from pyvolconv.dispatch import set_precision

from .units import WITH, unit_of


@pytest.fixture(params=["own", "plain"])
def unit(request):
    return unit_of(request.param)


@pytest.fixture
def own():
    return unit_of("own")


@pytest.fixture(params=WITH)
def each_pass(request):
    return request.param


@pytest.fixture
def split_into():
    """split_into(count): settings of the user that make it `count` parts; undone at the end."""
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision

    def choose_settings(count: int) -> None:
        set_precision("high" if count == 2 else "default")
        conv.fp32_precision = "bf16" if count == 1 else before

    yield choose_settings
    set_precision("default")
    conv.fp32_precision = before


@pytest.fixture(params=[3, 2, 1])
def parts(request, split_into):
    split_into(request.param)
    return request.param
