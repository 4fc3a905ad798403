"""Several processes: DistributedDataParallel and FSDP2 train an accelerated network as one process does.

The two-process runs are those of `benchmarks/distributed.py` under torchrun. The rest looks at what the wrappers do to
modules and gradients, for which a group of one process is enough.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import pyvolconv
from pyvolconv import dispatch
from pyvolconv.train.models import build

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "distributed.py"
SIZE = (6, 8, 8)
specification = importlib.util.spec_from_file_location("distributed", SCRIPT)
distributed = importlib.util.module_from_spec(specification)
specification.loader.exec_module(distributed)
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "accelerate"), [("ddp", "before"), ("fsdp", "after")])
def test_two_processes_train_as_one(parallel, accelerate):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += ["--parallel", parallel, "--accelerate", accelerate, "--batch", "8", "--steps", "6"]
    command += ["--size", *map(str, SIZE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Grad strides do not match" not in done.stderr
    got = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    for alone in (distributed.train(None, how, SIZE, 8, 6) for how in (accelerate, "never")):
        assert got == pytest.approx(alone, abs=2e-5)
    # Averages over the whole batch are not those of a half, and steps matter.
    assert len({round(loss, 3) for loss in got}) > 3


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def step(model, x):
    model(x).square().mean().backward()


LAYERS = {
    "network": lambda: build("cnn", SIZE).features,
    "one input channel": lambda: nn.Conv3d(1, 4, 3, padding=1),
    "one voxel": lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 6, 1)),
    "one of everything": lambda: nn.Conv3d(1, 1, 1),
    "one output channel": lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 1, 3)),
    "flat": lambda: nn.Sequential(nn.Conv3d(1, 4, (1, 3, 3)), nn.Conv3d(4, 6, (3, 1, 1))),
    "depthwise": lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3, groups=4)),
    "transposed": lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ConvTranspose3d(4, 1, 2, stride=2)),
    "pooled": lambda: nn.Sequential(nn.Conv3d(1, 4, 1), nn.LeakyReLU(), nn.MaxPool3d(2)),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("in_buckets", [False, True], ids=["", "gradient_as_bucket_view"])
@pytest.mark.parametrize("x_format", ["contiguous_format", "channels_last_3d"])
@pytest.mark.parametrize("w_format", ["contiguous_format", "channels_last_3d"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_have_the_strides_of_buckets(name, w_format, x_format, in_buckets):
    """DistributedDataParallel lays buckets out as parameters are, and warns of every gradient that is not."""
    theirs = LAYERS[name]().to(memory_format=getattr(torch, w_format))
    ours = pyvolconv.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 1, *SIZE).to(memory_format=getattr(torch, x_format))
    step(theirs, x)
    parallel = DistributedDataParallel(ours, gradient_as_bucket_view=in_buckets)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                parallel.zero_grad()
                step(parallel, x)
    finally:
        torch.set_warn_always(False)
    assert [str(one.message) for one in told if "strides" in str(one.message)] == []
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad.stride() == mine.stride()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    """Has a convolution that is not used in every step."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Conv3d(1, 3, 3, padding=1), nn.Conv3d(3, 3, 1)
        self.use = False

    def forward(self, x):
        y = self.always(x).relu()
        return self.sometimes(y) if self.use else y


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
def test_options_of_data_parallel(option, how):
    theirs = Branches() if option == "find_unused_parameters" else build("cnn", SIZE)
    ours, x = copy.deepcopy(theirs), torch.randn(2, 1, *SIZE)
    if how == "before":
        pyvolconv.accelerate(ours)
    models = [DistributedDataParallel(model, **{option: True}) for model in (theirs, ours)]
    if how == "after":
        assert pyvolconv.accelerate(models[1]) is models[1]
    for use in (False, True, True):
        theirs.use = ours.use = use
        for model in models:
            with dispatch.listen() as asked:
                step(model, x)
            assert bool(asked) == (model is models[1])
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("units", ["root", "sequential", "layers"])
def test_sharded_parameters(units, how):
    """Whole models run their chains in one pass; units inside of a chain have hooks, and are called one by one."""

    def sharded(model):
        mesh = init_device_mesh("cpu", (1,))
        inner = {"root": [], "sequential": [model.features]}.get(units)
        for unit in [one for one in model.features if isinstance(one, nn.Conv3d)] if inner is None else inner:
            fully_shard(unit, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    theirs, x = build("cnn", SIZE), torch.randn(2, 1, *SIZE)
    ours = copy.deepcopy(theirs)
    ours = sharded(pyvolconv.accelerate(ours)) if how == "before" else pyvolconv.accelerate(sharded(ours))
    for _ in range(2):
        step(theirs, x)
        with dispatch.listen() as asked:
            step(ours, x)
        assert len(asked) == 8
        assert all((problem.pool is not None) == (units == "root") for problem, _ in asked)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("how", ["before", "after"])
def test_reverting_one_sharded_model_leaves_others(how):
    """FSDP makes one class for all modules of a class, and finds it again by that class."""

    def model():
        mesh, convolution = init_device_mesh("cpu", (1,)), nn.Conv3d(1, 3, 3)
        if how == "before":
            return fully_shard(pyvolconv.accelerate(convolution), mesh=mesh)
        return pyvolconv.accelerate(fully_shard(convolution, mesh=mesh))

    def is_ours(module):
        with dispatch.listen() as asked:
            step(module, x)
        return bool(asked)

    x = torch.randn(1, 1, *SIZE)
    first, second = model(), model()
    names = type(first).__name__, type(first).__module__
    assert pyvolconv.revert(first) is first
    assert (type(first).__name__, type(first).__module__) == names
    assert not is_ours(first)
    assert is_ours(second)
    assert is_ours(model())
    expected = nn.functional.conv3d(x, *(one.full_tensor() for one in first.parameters()))
    assert torch.equal(first(x), expected)
    first.reshard()
    assert is_ours(pyvolconv.accelerate(first))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["Conv3d", "ConvTranspose3d"])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
def test_distributed_tensors_are_left_to_torch(placement, name):
    """Torch knows how to divide its own operators over tensors that are spread over processes."""
    mesh = init_device_mesh("cpu", (1,))
    results = []
    x = torch.randn(2, 2, 5, 5, 5)
    theirs = getattr(nn, name)(2, 3, 3)
    for model in (theirs, pyvolconv.accelerate(copy.deepcopy(theirs))):
        distribute_module(model, mesh)
        y = model(distribute_tensor(x, mesh, [placement]))
        y.square().mean().backward()
        results.append((y.placements, y.full_tensor(), model.weight.grad.full_tensor()))
    (placements, *expected), (ours, *got) = results
    assert ours == placements
    assert all(map(torch.equal, got, expected))


@pytest.mark.usefixtures("group")
def test_channels_last_weights_are_refused_by_torch():
    for accelerated in (False, True):
        model = build("cnn", SIZE).to(memory_format=torch.channels_last_3d)
        if accelerated:
            pyvolconv.accelerate(model)
        with pytest.raises(NotImplementedError, match="FSDP does not support non-contiguous parameters"):
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
