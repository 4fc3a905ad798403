"""Whole networks of others, unmodified, torch beside pyvolconv: `python benchmarks/networks.py`.

Each network runs one inference and one training step (Adam, cross-entropy of random labels) on a random volume: torch
in both memory formats and after `pyvolconv.accelerate`, in both memory formats too, in turns, with equal threads and
pages kept. Before anything is timed the outputs and all parameter gradients are compared with torch's.

Needs `pip install monai dynamic-network-architectures pytorchvideo diffusers`; a network whose package is missing or
does not load is left out and named.
`--profile` prints where the time of our better training step goes.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyvolconv
from pyvolconv.cost.timing import alternate

FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
CLASSES = 3


def monai_unet() -> tuple[nn.Module, Tensor]:
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=CLASSES,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
        num_res_units=2,
    )
    return model, torch.randn(1, 1, 96, 96, 96)


def plain_conv_unet() -> tuple[nn.Module, Tensor]:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = 4
    model = PlainConvUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=[32, 64, 128, 256],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2],
        n_conv_per_stage=2,
        num_classes=CLASSES,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return model, torch.randn(1, 1, 64, 64, 64)


def x3d() -> tuple[nn.Module, Tensor]:
    from pytorchvideo.models.x3d import create_x3d

    model: nn.Module = create_x3d(input_clip_length=13, input_crop_size=160, dropout_rate=0.0)
    return model, torch.randn(1, 3, 13, 160, 160)


def wan_blocks() -> tuple[nn.Module, Tensor]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    return nn.Sequential(WanResidualBlock(96, 96), WanResidualBlock(96, 192)), torch.randn(1, 96, 5, 64, 64)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MONAI UNet 96^3": monai_unet,
    "nnU-Net PlainConvUNet 64^3": plain_conv_unet,
    "X3D-S 13x160x160": x3d,
    "Wan VAE residual blocks 5x64x64": wan_blocks,
}


def variants(model: nn.Module, x: Tensor) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The same network from the same weights: by torch and by pyvolconv, in both memory formats."""
    for label, memory_format in FORMATS.items():
        for who in ("torch", "pyvolconv"):
            ours = copy.deepcopy(model)
            for module in ours.modules():
                if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):  # others have parameters of rank 4
                    module.to(memory_format=memory_format)
            if who == "pyvolconv":
                pyvolconv.accelerate(ours)
            yield f"{who} {label}", ours, x.to(memory_format=memory_format)


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model.eval()(x)
        return result

    return run


def training(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def run() -> Tensor:
        model.train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def relative_difference(results: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, of several tensors as one vector."""
    pairs = [(a.double(), b.double()) for a, b in zip(results, expected, strict=True)]
    difference, norm = (
        math.sqrt(sum(float(t.square().sum()) for t in ts)) for ts in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return difference / norm


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    """Check, measure, and print a row per network and kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each candidate (default 5)")
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--profile", action="store_true", help="print the operators of our better training step")
    arguments = parser.parse_args()
    pyvolconv.keep_pages()
    console = Console(width=120)
    table = Table(title=f"Whole networks, ms, {torch.get_num_threads()} threads, pages kept")
    for column in ("network", "step"):
        table.add_column(column)
    for column in ("torch contiguous", "torch ch. last", "ours contiguous", "ours ch. last", "speed-up", "difference"):
        table.add_column(column, justify="right")
    for name, make in NETWORKS.items():
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        try:
            model, x = make()
        except (ImportError, RuntimeError) as missing:
            console.print(f"{name} is left out: {missing}")
            continue
        with torch.no_grad():
            samples, classes, *voxels = copy.deepcopy(model)(x).shape
        labels = torch.randint(classes, (samples, *voxels))
        candidates = {label: (network, volume) for label, network, volume in variants(model, x)}
        for kind in ("inference", "training"):
            steps = {
                label: inference(network, volume) if kind == "inference" else training(network, volume, labels)
                for label, (network, volume) in candidates.items()
            }
            results = {label: step() for label, step in steps.items()}
            expected = results["torch contiguous"]
            if kind == "inference":
                differences = [relative_difference([result], [expected]) for result in results.values()]
            else:
                reference = gradients(candidates["torch contiguous"][0])
                differences = [relative_difference(gradients(network), reference) for network, _ in candidates.values()]
            timings = alternate(steps, rounds=arguments.rounds, warmup=1)
            median = {label: 1e3 * timing.median for label, timing in timings.items()}
            ours, theirs = (min(median[f"{who} {label}"] for label in FORMATS) for who in ("pyvolconv", "torch"))
            table.add_row(
                name,
                kind,
                *(f"{median[f'{who} {label}']:.1f}" for who in ("torch", "pyvolconv") for label in FORMATS),
                f"{theirs / ours:.2f}x",
                f"{max(differences):.1e}",
            )
            if arguments.profile and kind == "training":
                best = min((label for label in steps if label.startswith("pyvolconv")), key=median.__getitem__)
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    steps[best]()
                console.print(f"{name}, {best}")
                console.print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16), highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
