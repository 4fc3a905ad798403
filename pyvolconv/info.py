"""What this installation is and can do here, as `pyvolconv info` prints it."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import tuned
from .cost.gpu import gpu_facts
from .cost.machine import openmp_runtimes, versions
from .dispatch import ENVIRONMENT_VARIABLE, backends, use_backend
from .host import processor
from .problem import PASSES, ConvProblem, Pass

ISA_VARIABLE = "PYVOLCONV_ISA"

_ORDINARY = ConvProblem(2, 16, 16, (8, 8, 8), (3, 3, 3), padding=((1, 1),) * 3)
_PROBES = {
    "": _ORDINARY,
    "from 1 channel": _ORDINARY.with_(in_channels=1),
    "float16": _ORDINARY.with_(dtype="float16"),
    "depthwise": _ORDINARY.with_(groups=16),
    "patches": ConvProblem(8, 3, 16, (2, 8, 8), (2, 8, 8)),
}
"""Ordinary convolutions, the most usual first."""


@dataclass(frozen=True)
class BackendInfo:
    """One backend and what it can run here of ordinary convolutions.

    Attributes:
        name, role, device: as printed.
        scope: which of such convolutions and passes, e.g. "from 1 channel: forward"; empty for all of the most usual.
        reason: why it can run none of them; empty when it can.
    """

    name: str
    role: str
    device: str
    scope: str
    reason: str


def installation() -> dict[str, str]:
    """Versions, processor, instruction set, threads, OpenMP, GPU, cache location, forced backend: label to value.

    Of a GPU also its compute capability, multiprocessors, memory, TMA, driver, CUDA, cuDNN and Triton.
    """
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "platform": platform.platform(),
        "processor": processor(),
        "instruction set": _isa(),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS changes it)",
        "OpenMP": openmp_runtimes(),
        **(gpu_facts() if torch.cuda.is_available() else {"GPU": "none that torch can use"}),
        "cache": _tuned(),
        "forced backend": _forced(),
    }


def backend_infos() -> list[BackendInfo]:
    """Every backend in the dispatcher's order, on the CPU and, where there is one, on the GPU."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = []
    for backend in backends():
        role = "torch itself, the peer" if not backend.ours else "automatic" if backend.automatic else "only when named"
        for device in devices:
            scope, reason = _ability(backend.unsupported_reasons, device)
            found.append(BackendInfo(backend.name, role, device, scope, reason))
    return found


def _ability(refuse: Callable[[ConvProblem, Pass], list[str]], device: str) -> tuple[str, str]:
    """(scope, reason) of the first probe that a backend can run; the reason of the most usual where there is none."""
    try:
        for label, probe in _PROBES.items():
            problem = probe.with_(device=device)
            able = [pass_ for pass_ in PASSES if not refuse(problem, pass_)]
            if able:
                passes = "" if len(able) == len(PASSES) else ", ".join(able)
                return ": ".join(filter(None, (label, passes))), ""
        reasons = refuse(_ORDINARY.with_(device=device), "forward")
    except ValueError as error:
        # Wrong settings are an error for whoever computes, and here what is to be shown.
        return "", str(error)
    return "", "; ".join(" ".join(reason.split()) for reason in reasons)


def _tuned() -> str:
    place = tuned.location()
    try:
        where = f" on the CPU, {tuned.count('cuda')} on the GPU," if torch.cuda.is_available() else ""
        problems = f"{tuned.count()} problems{where} for these threads, precision and versions"
    except ValueError as error:
        return f"not known: {error}"
    return f"{problems}, kept in {place}" if place else f"{problems}; {tuned.OFF_VARIABLE} is set, so none are kept"


def _forced() -> str:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return "none"
    try:
        with use_backend(name):
            return f"{name}, by {ENVIRONMENT_VARIABLE}"
    except ValueError as error:
        return f"{ENVIRONMENT_VARIABLE}={name}: {error}"


def _isa() -> str:
    try:
        compiled = importlib.import_module("pyvolconv._C")
    except ImportError as error:
        return f"compiled part not available: {error}"
    cap = os.environ.get(ISA_VARIABLE)
    try:
        words = f"{compiled.current_isa()} in use; this machine runs {', '.join(compiled.supported_isas())}"
    except ValueError as error:
        return f"none usable: {error}"
    return f"{words}; capped by {ISA_VARIABLE}={cap}" if cap else words
