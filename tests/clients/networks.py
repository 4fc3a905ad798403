"""Networks of others, unmodified, in any size: the tests build them small, `benchmarks/networks.py` as they are used.

Each builder imports its package when it is called and raises ImportError where that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .imports import named_torchvision, only_what_works

Volume = tuple[int, int, int]


def one_result(model: nn.Module, *inputs: Tensor) -> Tensor:
    result: Tensor = model(*inputs)
    return result


def of_two_pathways(model: nn.Module, *inputs: Tensor) -> Tensor:
    """SlowFast takes a list, and puts its own intermediate results in it."""
    result: Tensor = model(list(inputs))
    return result


def decoded(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What an autoencoder of diffusers makes of a video, there and back."""
    result: Tensor = model(*inputs, return_dict=False)[0]
    return result


@dataclass(frozen=True)
class Network:
    """A model, inputs for it, and how it is called."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor] = one_result

    def __call__(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        return self.call(model, *inputs)


def monai_unet(channels: Sequence[int], size: Volume, batch: int = 1) -> Network:
    with only_what_works():
        from monai.networks.nets import UNet

    strides = (2,) * (len(channels) - 1)
    model = UNet(3, in_channels=1, out_channels=3, channels=channels, strides=strides, num_res_units=2)
    return Network(model, (torch.randn(batch, 1, *size),))


def monai_segresnet(filters: int, size: Volume, batch: int = 1) -> Network:
    with only_what_works():
        from monai.networks.nets import SegResNet

    model = SegResNet(3, init_filters=filters, in_channels=1, out_channels=3)
    return Network(model, (torch.randn(batch, 1, *size),))


def monai_resnet(layers: Sequence[int], widths: Sequence[int], size: Volume, batch: int = 1) -> Network:
    """A classifier with BatchNorm3d."""
    with only_what_works():
        from monai.networks.nets import ResNet

    model = ResNet("basic", layers, widths, spatial_dims=3, n_input_channels=1, num_classes=3)
    return Network(model, (torch.randn(batch, 1, *size),))


def monai_dynunet(filters: Sequence[int], size: Volume, batch: int = 1) -> Network:
    with only_what_works():
        from monai.networks.nets import DynUNet

    levels = len(filters)
    strides = (1, *(2,) * (levels - 1))
    model = DynUNet(
        3, 1, 3, kernel_size=(3,) * levels, strides=strides, upsample_kernel_size=strides[1:], filters=filters
    )
    return Network(model, (torch.randn(batch, 1, *size),))


def nnunet_options(channels: Sequence[int]) -> dict[str, Any]:
    """As nnU-Net plans: the first stage with kernels that are flat along the depth, then isotropic ones."""
    levels = len(channels)
    return {
        "input_channels": 1,
        "n_stages": levels,
        "features_per_stage": list(channels),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * (levels - 1)],
        "strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * (levels - 2)],
        "num_classes": 3,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def plain_conv_unet(channels: Sequence[int], size: Volume, batch: int = 1, **options: Any) -> Network:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    blocks = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
    model = PlainConvUNet(**nnunet_options(channels) | blocks | options)
    return Network(model, (torch.randn(batch, 1, *size),))


def residual_encoder_unet(channels: Sequence[int], size: Volume, batch: int = 1, **options: Any) -> Network:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    blocks = {"n_blocks_per_stage": [1, 3, 4, 6][: len(channels)], "n_conv_per_stage_decoder": 1}
    model = ResidualEncoderUNet(**nnunet_options(channels) | blocks | options)
    return Network(model, (torch.randn(batch, 1, *size),))


def x3d(frames: int, crop: int, batch: int = 1, **options: Any) -> Network:
    with named_torchvision():
        from pytorchvideo.models.x3d import create_x3d

    model = create_x3d(input_clip_length=frames, input_crop_size=crop, dropout_rate=0.0, **options)
    return Network(model, (torch.randn(batch, 3, frames, crop, crop),))


def slowfast(frames: int, crop: int, batch: int = 1, **options: Any) -> Network:
    """`frames` of the slow pathway; the fast one has four times as many."""
    with named_torchvision():
        from pytorchvideo.models.slowfast import create_slowfast

    last = crop // 32
    pools = ((frames, last, last), (4 * frames, last, last))
    model = create_slowfast(dropout_rate=0.0, head_pool_kernel_sizes=pools, **options)
    clips = (torch.randn(batch, 3, length, crop, crop) for length in (frames, 4 * frames))
    return Network(model, tuple(clips), of_two_pathways)


def wan_vae(frames: int, size: int, batch: int = 1, **options: Any) -> Network:
    with only_what_works():
        from diffusers import AutoencoderKLWan

    return Network(AutoencoderKLWan(**options), (torch.randn(batch, 3, frames, size, size),), decoded)


def wan_blocks(channels: int, frames: int, size: int, batch: int = 1) -> Network:
    with only_what_works():
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    model = nn.Sequential(WanResidualBlock(channels, channels), WanResidualBlock(channels, 2 * channels))
    return Network(model, (torch.randn(batch, channels, frames, size, size),))


def cogvideox_vae(frames: int, size: int, batch: int = 1, **options: Any) -> Network:
    with only_what_works():
        from diffusers import AutoencoderKLCogVideoX

    return Network(AutoencoderKLCogVideoX(**options), (torch.randn(batch, 3, frames, size, size),), decoded)


def qwen2_vl_patches(patches: int, width: int, **options: Any) -> Network:
    with only_what_works():
        from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    model = PatchEmbed(embed_dim=width, **options)
    voxels = model.in_channels * model.temporal_patch_size * model.patch_size**2
    return Network(model, (torch.randn(patches, voxels),))


@dataclass(frozen=True)
class Client:
    """A network in a size for tests, and the package that it comes from."""

    name: str
    package: str
    build: Callable[[], Network]


CLIENTS = (
    Client("MONAI UNet", "monai", lambda: monai_unet((4, 8, 16), (16, 16, 16))),
    Client("MONAI SegResNet", "monai", lambda: monai_segresnet(8, (16, 16, 16))),
    Client("MONAI ResNet", "monai", lambda: monai_resnet((1, 1, 1, 1), (4, 8, 8, 16), (16, 20, 24), batch=2)),
    Client("MONAI DynUNet", "monai", lambda: monai_dynunet((4, 8, 16), (16, 16, 16))),
    Client(
        "nnU-Net PlainConvUNet",
        "dynamic_network_architectures",
        lambda: plain_conv_unet((4, 8, 16), (6, 16, 16)),
    ),
    Client(
        "nnU-Net ResidualEncoderUNet",
        "dynamic_network_architectures",
        lambda: residual_encoder_unet((4, 8, 16), (6, 16, 16)),
    ),
    Client(
        "X3D",
        "pytorchvideo",
        lambda: x3d(
            4,
            32,
            batch=2,
            width_factor=1.0,
            depth_factor=1.0,
            stem_dim_in=8,
            bottleneck_factor=1.5,
            head_dim_out=32,
            model_num_class=5,
        ),
    ),
    Client(
        "SlowFast",
        "pytorchvideo",
        lambda: slowfast(
            2, 32, batch=2, slowfast_channel_reduction_ratio=(4,), stem_dim_outs=(4, 1), model_num_class=5
        ),
    ),
    Client(
        "Wan VAE",
        "diffusers",
        lambda: wan_vae(5, 32, base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    ),
    Client(
        "CogVideoX VAE",
        "diffusers",
        lambda: cogvideox_vae(
            17, 16, block_out_channels=(8, 8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4
        ),
    ),
    Client("Qwen2-VL patch embedding", "transformers", lambda: qwen2_vl_patches(64, 32)),
)
