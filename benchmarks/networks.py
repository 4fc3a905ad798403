"""Whole networks of others, unmodified, torch beside pyvolconv: `python -m benchmarks.networks`.

Each network runs one inference and one training step (Adam, cross-entropy of random labels) on a random volume: torch
in both memory formats and after `pyvolconv.accelerate`, in both memory formats too, in turns, with equal threads and
pages kept. Before anything is timed the outputs and all parameter gradients are compared with torch's.

Needs the packages that CONTRIBUTING.md installs for tests of clients, whose builders these are; a network whose package
is missing or does not load is left out and named.
`--keep-channels-last` has InstanceNorm3d keep that format, as `accelerate` does on request; `--profile` prints where
the time of our better training step goes.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyvolconv
from pyvolconv.cost.timing import alternate
from tests.clients.networks import (
    Network,
    cogvideox_vae,
    monai_dynunet,
    monai_resnet,
    monai_segresnet,
    monai_unet,
    plain_conv_unet,
    qwen2_vl_patches,
    residual_encoder_unet,
    slowfast,
    wan_blocks,
    wan_vae,
    x3d,
)

FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}

NETWORKS: dict[str, Callable[[], Network]] = {
    "MONAI UNet 96^3": lambda: monai_unet((16, 32, 64, 128, 256), (96, 96, 96)),
    "MONAI SegResNet 96^3": lambda: monai_segresnet(8, (96, 96, 96)),
    "MONAI ResNet-18 64^3, batch 4": lambda: monai_resnet((2, 2, 2, 2), (64, 128, 256, 512), (64, 64, 64), batch=4),
    "MONAI DynUNet 48^3": lambda: monai_dynunet((32, 64, 128, 256), (48, 48, 48)),
    "nnU-Net PlainConvUNet 64^3": lambda: plain_conv_unet(
        (32, 64, 128, 256), (64, 64, 64), kernel_sizes=3, strides=[1, 2, 2, 2]
    ),
    "nnU-Net ResidualEncoderUNet 24x80x80": lambda: residual_encoder_unet((32, 64, 128, 256), (24, 80, 80)),
    "X3D-S 13x160x160": lambda: x3d(13, 160),
    "SlowFast-R50 4+16x160x160": lambda: slowfast(4, 160),
    "Wan VAE residual blocks 5x64x64": lambda: wan_blocks(96, 5, 64),
    "Wan VAE, half width, 5x48x48": lambda: wan_vae(5, 48, base_dim=48),
    "CogVideoX VAE, half width, 9x32x32": lambda: cogvideox_vae(9, 32, block_out_channels=(64, 128, 128, 256)),
    "Qwen2-VL patch embedding, 4096 patches": lambda: qwen2_vl_patches(4096, 1280),
}


def variants(network: Network, keep_channels_last: bool = False) -> Iterator[tuple[str, Network]]:
    """The same network from the same weights: by torch and by pyvolconv, in both memory formats."""
    for label, memory_format in FORMATS.items():
        inputs = tuple(x.to(memory_format=memory_format) if x.dim() == 5 else x for x in network.inputs)
        for who in ("torch", "pyvolconv"):
            model = copy.deepcopy(network.model)
            for module in model.modules():
                if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):  # others have parameters of rank 4
                    module.to(memory_format=memory_format)
            if who == "pyvolconv":
                pyvolconv.accelerate(model, keep_channels_last=keep_channels_last)
            yield f"{who} {label}", replace(network, model=model, inputs=inputs)


def inference(network: Network) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return network(network.model.eval(), network.inputs)

    return run


def training(network: Network, labels: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(network.model.parameters(), lr=0.0)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(network.model.train(), network.inputs), labels)
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
    parser.add_argument("--only", default="", help="parts of networks' names, with commas between them")
    parser.add_argument("--profile", action="store_true", help="print the operators of our better training step")
    parser.add_argument("--keep-channels-last", action="store_true", help="accelerate(model, keep_channels_last=True)")
    arguments = parser.parse_args()
    pyvolconv.keep_pages()
    console = Console(width=120)
    table = Table(title=f"Whole networks, ms, {torch.get_num_threads()} threads, pages kept")
    for column in ("network", "step"):
        table.add_column(column)
    for column in ("torch contiguous", "torch ch. last", "ours contiguous", "ours ch. last", "speed-up", "difference"):
        table.add_column(column, justify="right")
    for name, make in NETWORKS.items():
        if not any(part in name for part in arguments.only.split(",")):
            continue
        torch.manual_seed(0)
        try:
            made = make()
        except (ImportError, RuntimeError) as missing:
            console.print(f"{name} is left out: {missing}")
            continue
        with torch.no_grad():
            samples, classes, *voxels = made(copy.deepcopy(made.model), made.inputs).shape
        labels = torch.randint(classes, (samples, *voxels))
        candidates = dict(variants(made, arguments.keep_channels_last))
        for kind in ("inference", "training"):
            steps = {
                label: inference(network) if kind == "inference" else training(network, labels)
                for label, network in candidates.items()
            }
            results = {label: step() for label, step in steps.items()}
            expected = results["torch contiguous"]
            if kind == "inference":
                differences = [relative_difference([result], [expected]) for result in results.values()]
            else:
                reference = gradients(candidates["torch contiguous"].model)
                differences = [
                    relative_difference(gradients(network.model), reference) for network in candidates.values()
                ]
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
