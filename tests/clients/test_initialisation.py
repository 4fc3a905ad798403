"""Code of others that finds convolutions by isinstance, or is told which class to build with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyvolconv

from .agreement import measure
from .conftest import require_package
from .imports import only_what_works
from .networks import monai_unet, plain_conv_unet, residual_encoder_unet, slowfast

pytestmark = pytest.mark.clients


def assert_initialised_alike(model, initialise):
    """By the same random numbers to the same parameters, most of which were others."""
    before = copy.deepcopy(model)
    ours = pyvolconv.accelerate(copy.deepcopy(model))
    for each in (model, ours):
        torch.manual_seed(5)
        initialise(each)
    for name, parameter in model.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)]
    assert not any(torch.equal(before.get_submodule(n).weight, model.get_submodule(n).weight) for n in layers)


@pytest.mark.parametrize("build", [plain_conv_unet, residual_encoder_unet])
def test_he_initialisation_of_nnunet(build):
    require_package("dynamic_network_architectures")
    model = build((4, 8, 16), (6, 16, 16)).model
    assert_initialised_alike(model, lambda each: each.apply(each.initialize))


def test_initialisation_of_pytorchvideo():
    require_package("pytorchvideo")
    model = slowfast(2, 32, slowfast_channel_reduction_ratio=(4,), stem_dim_outs=(4, 1)).model
    from pytorchvideo.models.weight_init import init_net_weights

    assert_initialised_alike(model, init_net_weights)


def test_initialisation_of_qwen2_vl():
    require_package("transformers")
    with only_what_works():
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        config = Qwen2VLVisionConfig(depth=1, embed_dim=32, hidden_size=16, num_heads=2)
        model = Qwen2VisionTransformerPretrainedModel(config)
    assert_initialised_alike(model, lambda each: each.apply(each._init_weights))


@pytest.mark.parametrize("build", [plain_conv_unet, residual_encoder_unet])
def test_nnunet_builds_with_our_class(build):
    """It derives the dimensions, the norm and the transposed convolution from `issubclass(conv_op, nn.Conv3d)`."""
    require_package("dynamic_network_architectures")
    measured = measure(lambda: build((4, 8, 16), (6, 16, 16)), gradients=True)
    ours = build((4, 8, 16), (6, 16, 16), conv_op=pyvolconv.Conv3d).model
    assert {type(module) for module in ours.modules() if isinstance(module, nn.Conv3d)} == {pyvolconv.Conv3d}
    ours.load_state_dict(measured.network.model.state_dict(), strict=True)
    measured.assert_agrees(measured.by(ours), "built with pyvolconv.Conv3d")


def test_monai_builds_with_our_class(monkeypatch):
    """Its table of layers is where a user puts another class."""
    require_package("monai")
    measured = measure(lambda: monai_unet((4, 8, 16), (16, 16, 16)), gradients=True)
    from monai.networks.layers.factories import Conv

    monkeypatch.setattr(Conv, "components", Conv.components.copy())
    Conv.add_factory_callable("conv", lambda dimensions: {2: nn.Conv2d, 3: pyvolconv.Conv3d}[dimensions])
    ours = monai_unet((4, 8, 16), (16, 16, 16)).model
    assert {type(module) for module in ours.modules() if isinstance(module, nn.Conv3d)} == {pyvolconv.Conv3d}
    ours.load_state_dict(measured.network.model.state_dict(), strict=True)
    measured.assert_agrees(measured.by(ours), "built with pyvolconv.Conv3d")
