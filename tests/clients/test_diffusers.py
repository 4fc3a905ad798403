"""Video autoencoders: subclasses that change their own padding and keep frames, and how diffusers writes them."""

from __future__ import annotations

import copy

import pytest
import torch

import pyvolconv

from ..closeness import assert_close
from .agreement import measure
from .conftest import require_package
from .imports import only_what_works
from .networks import CLIENTS

pytestmark = pytest.mark.clients


@pytest.fixture(params=["Wan VAE", "CogVideoX VAE"])
def network(request):
    require_package("diffusers")
    return next(client for client in CLIENTS if client.name == request.param).build()


@pytest.fixture
def wan():
    require_package("diffusers")
    return next(client for client in CLIENTS if client.name == "Wan VAE").build()


def latents(model, video):
    with torch.no_grad():
        return model.encode(video).latent_dist.mean


def test_the_feature_cache_of_wan_has_a_place_for_each_convolution(wan):
    """It is as long as there are `isinstance(module, WanCausalConv3d)`, which it counts when it is built."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    model = wan.model
    model.clear_cache()
    lengths = len(model._feat_map), len(model._enc_feat_map)
    pyvolconv.accelerate(model)
    counted = [
        sum(isinstance(module, WanCausalConv3d) for module in part.modules()) for part in (model.decoder, model.encoder)
    ]
    assert tuple(counted) == lengths
    assert min(lengths) > 0


def test_what_is_encoded_does_not_depend_on_later_frames(network):
    model = pyvolconv.accelerate(network.model)
    (video,) = network.inputs
    first = latents(model, video)
    later = video.clone()
    later[:, :, -4:] += 1
    second = latents(model, later)
    assert torch.equal(second[:, :, 0], first[:, :, 0])
    assert not torch.equal(second[:, :, -1], first[:, :, -1])


def test_slices_of_a_batch(network):
    model = pyvolconv.accelerate(network.model)
    (video,) = network.inputs
    videos = torch.cat([video, video.flip(2)])
    model.enable_slicing()
    assert torch.equal(latents(model, videos), torch.cat([latents(model, video), latents(model, video.flip(2))]))


def test_padding_changed_after_acceleration(wan):
    """What the class does once, when it is built, somebody may do later."""
    layer = copy.deepcopy(wan.model.decoder.conv_in)
    ours = pyvolconv.accelerate(copy.deepcopy(layer))
    x, kept = torch.randn(1, 4, 3, 5, 6), torch.randn(1, 4, 2, 5, 6)
    for padding in ((0, 0, 0), (0, 1, 2), (1, 0, 0)):
        layer.padding = ours.padding = padding
        for arguments in ((x,), (x, kept)):
            assert_close(ours(*arguments), layer(*arguments))


def test_saved_and_loaded(network, tmp_path):
    """The files are those of the original, to the byte, and hold the original classes."""
    model = network.model
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = network(model, network.inputs)
    with only_what_works():
        model.save_pretrained(tmp_path / "torch")
        pyvolconv.accelerate(model).save_pretrained(tmp_path / "ours")
        loaded = type(model).from_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "torch").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "torch" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert [type(module) for module in loaded.modules()] == classes
    with torch.no_grad():
        assert torch.equal(network(loaded, network.inputs), expected)


def test_gradient_checkpointing_of_cogvideox():
    """Runs the blocks again in the backward pass."""
    require_package("diffusers")
    client = next(client for client in CLIENTS if client.name == "CogVideoX VAE")
    measured = measure(client.build, gradients=True)
    model = pyvolconv.accelerate(copy.deepcopy(measured.network.model))
    model.enable_gradient_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    measured.assert_agrees(measured.by(model), "with checkpoints")
