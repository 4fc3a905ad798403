"""Steps taken apart by a device's clock, which is made up here, and what is said of a GPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyvolconv.cost import gpu
from pyvolconv.cost.breakdown import PathProfile
from pyvolconv.cost.device_trace import trace_on_device
from pyvolconv.cost.machine import Machine
from pyvolconv.cost.profiler import STEPS_AT_ONCE, profile_step

MACHINE = Machine(
    "x", "x86_64", "AVX2", 2, 2, {}, 2**34, "cuda", 4e14, "given", 4e12, "none", "G", {}, {"float32": 5e13}
)
EMPTY, OPERATOR = 2e-6, 7e-6


class Clock:
    """A device that takes `OPERATOR` seconds for all between two marks but `EMPTY` where nothing is in between.

    It works on the queue behind a hold only if that lasts `needed` seconds.
    """

    def __init__(self, needed=0.0):
        self.needed = needed
        self.holds = []
        self.finished = True
        self.operators = 0
        self.time = 0.0

    def hold(self, seconds):
        self.holds.append(seconds)
        self.finished = False

    def mark(self):
        self.time += EMPTY
        return self.time, self.operators

    def passed(self, mark):
        return self.holds[-1] < self.needed

    def finish(self):
        self.finished = True

    def seconds(self, start, end):
        assert self.finished, "times are read when the device is done"
        return end[0] - start[0] + (end[1] - start[1]) * (OPERATOR - EMPTY)


def cnn():
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 3, 3), nn.Flatten(), nn.Linear(24, 2))


class Working(TorchDispatchMode):
    """Everything that runs inside occupies the device, beneath whoever watches."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.clock.operators += 1
        return func(*args, **(kwargs or {}))


def profiled(model, clock, repeats):
    with Working(clock):
        return profile_step(step_of(model), model, repeats=repeats, machine=MACHINE, clock=clock)


def step_of(model):
    x = torch.randn(2, 1, 6, 6, 6)

    def step():
        model.zero_grad()
        model(x).sum().backward()

    return step


def test_operators_have_the_devices_time():
    clock = Clock()
    model = cnn()
    profile = profiled(model, clock, 3)
    convolutions = [entry for entry in profile.entries if entry.kind == "conv" and not entry.split_estimated]
    assert convolutions
    for entry in convolutions:
        assert entry.seconds == pytest.approx((OPERATOR - EMPTY) * entry.calls)
    assert profile.queued
    parts = sum(entry.seconds for entry in profile.entries) + sum(profile.framework_seconds.values())
    assert parts == pytest.approx(profile.profiled_seconds)
    assert set(profile.framework_seconds) == {"other"}
    assert len(profile.step.seconds) == 3
    labels = [row.label for row in PathProfile("p", True, "cached", 2, profile).rows()]
    assert labels[-1] == "GPU waits for the host"


def test_both_gradients_of_a_convolution_are_told_apart():
    clock = Clock()
    model = cnn()
    profile = profiled(model, clock, 1)
    split = [entry for entry in profile.entries if entry.split_estimated]
    assert [entry.pass_ for entry in split] == ["grad_input", "grad_weight"]
    assert split[0].seconds == pytest.approx(split[1].seconds)


def test_the_device_is_held_until_the_whole_step_is_queued():
    model = nn.Conv3d(1, 2, 3)
    clock = Clock()
    assert trace_on_device(step_of(model), model, clock).queued
    assert clock.holds[0] == 0
    assert len(clock.holds) == 2
    impatient = Clock()
    impatient.passed = lambda mark: len(impatient.holds) < 4
    assert trace_on_device(step_of(model), model, impatient).queued
    assert impatient.holds[3] == pytest.approx(2 * impatient.holds[2]) == pytest.approx(4 * impatient.holds[1])


def test_a_queue_that_never_holds_the_step_is_admitted():
    model = nn.Conv3d(1, 2, 3)
    clock = Clock(needed=1e9)
    profile = profiled(model, clock, 1)
    assert not profile.queued
    assert profile.to_dict()["queued"] is False


def test_steps_in_a_row_are_timed_as_one():
    clock, runs = Clock(), []
    model = nn.Linear(2, 1)

    def step():
        runs.append(clock.finished)
        model(torch.ones(1, 2)).sum().backward()

    profile_step(step, model, repeats=1, warmup=0, machine=MACHINE, clock=clock)
    in_a_row = [index for index in range(len(runs)) if all(runs[index : index + STEPS_AT_ONCE])]
    assert in_a_row


def test_without_tf32_the_peak_is_that_of_float32():
    assert MACHINE.without_tf32().peak_flops == 5e13
    assert MACHINE.without_tf32().least_seconds(5e13, 0) == 1
    assert (MACHINE.name, MACHINE.peak_name) == ("G", "TF32 matrix peak")


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 03:29:03 UTC 2025\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)\n",
    ],
)
def test_driver_version(tmp_path, line):
    (tmp_path / "version").write_text(line + "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0)\n")
    assert gpu.driver_version(tmp_path / "version") == "570.86.15"


def test_driver_version_where_the_system_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert gpu.driver_version(tmp_path / "none") == "for CUDA up to 12.8"


@pytest.mark.parametrize(("number", "words"), [(91900, "9.19.0"), (91002, "9.10.2"), (8907, "8.9.7"), (None, "none")])
def test_cudnn_version(monkeypatch, number, words):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert gpu.cudnn_version() == words


def test_ceilings_are_measured_in_every_precision(monkeypatch):
    monkeypatch.setattr(gpu, "MATRIX_SIZE", 16)
    monkeypatch.setattr(gpu, "LARGEST_COPY", 4096)
    before = torch.backends.cuda.matmul.fp32_precision
    asked = []
    mm = torch.mm

    def recorded(a, b, out):
        asked.append((a.dtype, torch.backends.cuda.matmul.fp32_precision))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", recorded)
    rates = gpu.matrix_rates("cpu")
    assert list(rates) == ["float32", "TF32", "bfloat16"]
    assert min(rates.values()) > 0
    assert list(dict.fromkeys(asked)) == [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.bfloat16, "ieee"),
    ]
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert gpu.copy_bandwidth("cpu") > 0


def test_operands_fit_into_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**34))
    assert gpu._affordable("cuda", 4 * 8192**2, 8192, root=2) == 4096
    assert gpu._affordable("cuda", 2**30, 2**30) == 2**26
