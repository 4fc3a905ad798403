"""Train the CNN of the comparison in several processes: data parallel, or with sharded parameters.

    python benchmarks/distributed.py                                        one process, the whole batch
    torchrun --nproc-per-node 2 benchmarks/distributed.py --parallel ddp    DistributedDataParallel
    torchrun --nproc-per-node 2 benchmarks/distributed.py --parallel fsdp   FSDP2, fully_shard

Every process takes its share of each batch, and gradients are averaged, so the losses that are printed, averages over
the whole batch, are those of one process but for rounding. `--accelerate` says whether pyvolconv is there before the
model is wrapped, after it, or never. Processes talk by gloo, which needs no GPU.
"""

from __future__ import annotations

import argparse
import os
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyvolconv
from pyvolconv.problem import Size3
from pyvolconv.train.models import MISSION_SIZE, build

Parallel = Literal["ddp", "fsdp"]
Accelerate = Literal["before", "after", "never"]


def parallel_model(model: nn.Module, parallel: Parallel | None, accelerate: Accelerate) -> nn.Module:
    """The model as every process trains it.

    Needs an initialised process group, unless `parallel` is None.
    """
    if accelerate == "before":
        pyvolconv.accelerate(model)
    if parallel == "ddp":
        # Gradients lie in the memory that is sent, so strides have to fit.
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif parallel == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if accelerate == "after":
        pyvolconv.accelerate(model)
    return model


def train(
    parallel: Parallel | None,
    accelerate: Accelerate = "before",
    size: Size3 = MISSION_SIZE,
    batch: int = 32,
    steps: int = 10,
) -> list[float]:
    """The loss of each step over the whole batch, which is the same in all processes."""
    rank, processes = (0, 1) if parallel is None else (dist.get_rank(), dist.get_world_size())
    model = parallel_model(build("cnn", size), parallel, accelerate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # The same batches everywhere; each process takes every n-th sample.
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(batch, 1, *size, generator=generator), torch.randint(2, (batch,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rank::processes]), y[rank::processes])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if parallel is not None:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
    return losses


def main() -> None:
    """Train, and have the first process print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=get_args(Parallel), help="how processes share the work, under torchrun")
    parser.add_argument("--accelerate", choices=get_args(Accelerate), default="before", help="(default: before)")
    parser.add_argument("--size", type=int, nargs=3, default=MISSION_SIZE, help="of the volumes (default: 29 30 60)")
    parser.add_argument("--batch", type=int, default=32, help="samples per step, in all processes (default: 32)")
    parser.add_argument("--steps", type=int, default=10, help="(default: 10)")
    arguments = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.batch % processes:
        parser.error(f"--batch {arguments.batch}: {processes} processes need equal shares, or averages are no averages")
    if arguments.parallel:
        dist.init_process_group("gloo")
    try:
        size = tuple(arguments.size)
        losses = train(arguments.parallel, arguments.accelerate, size, arguments.batch, arguments.steps)
        if not arguments.parallel or dist.get_rank() == 0:
            for number, loss in enumerate(losses, 1):
                print(f"step {number}: loss {loss:.6f}", flush=True)
    finally:
        if arguments.parallel:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
