"""A CUDA device that is not there: tensors that say they are on one, and a clock, streams and graphs for them.

What is computed is computed on the CPU, and tensors in Python (not in torch's C++) call themselves CUDA tensors. So a
test goes every way that code of this package takes on a GPU; what only a GPU can tell, it does not.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import torch

FACTORIES = ("empty", "zeros", "ones", "full", "randn", "tensor", "arange", "as_tensor", "empty_like", "zeros_like")
METHODS = ("to", "new_empty", "new_zeros", "new_tensor", "new_ones", "new_full")
MEMORY = 2**33


class Event:
    """A moment: what is launched is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


class Stream:
    def wait_stream(self, other: Any) -> None:
        """Everything is done at once."""


class Generator(torch.Generator):
    """One of the CPU, whatever it is asked for."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls)


def install(monkeypatch: Any) -> None:
    """Until the test's end there is one CUDA device of compute capability 9.0, on which all tensors are."""
    from pyvolconv import derivatives, shortcut
    from pyvolconv.train import graphed

    # The short way is the CPU's, by what torch knows of a tensor.
    for module in (shortcut, derivatives):
        monkeypatch.setattr(module, "is_ordinary", lambda *tensors: False)
    cuda = torch.device("cuda", 0)
    cpu = torch.device("cpu")

    def on_cpu(value: Any) -> Any:
        names_cuda = value == "cuda" if isinstance(value, str) else getattr(value, "type", None) == "cuda"
        return cpu if names_cuda else value

    def redirected(function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in named.items()})

        return call

    for name in FACTORIES:
        monkeypatch.setattr(torch, name, redirected(getattr(torch, name)))
    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, redirected(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: cuda), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    properties = SimpleNamespace(name="Pretended GPU", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY)
    stand_ins = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 2,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 1000,
        "max_memory_allocated": lambda device=None: 5000,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "device": lambda device: contextlib.nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "_sleep": lambda cycles: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(graphed, "_capture", captured)


def captured(step: Any) -> Any:
    """In place of a CUDA graph: the step, which runs once when it is captured."""
    step()
    return step
