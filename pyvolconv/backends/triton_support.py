"""What the backends in Triton share: what this machine lacks, the device of a launch."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..problem import ConvProblem

_COMMON = "pyvolconv.kernels.triton_common"


def missing_here(problem: ConvProblem) -> list[str]:
    """Why no kernel in Triton can run a problem here and now: package, device, dtype; empty when one can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed: pip install triton (Linux)")
    if problem.device == "cuda":
        reasons += _missing_on_cuda(problem.dtype)
    elif problem.device != "cpu":
        reasons.append(f"runs on cuda tensors, not on {problem.device}")
    elif not interpreter_asked():
        reasons.append("runs on cuda tensors, not on cpu; for tests start Python with TRITON_INTERPRET=1")
    else:
        reasons += _missing_in_interpreter()
    if problem.dtype not in ("float32", "float16", "bfloat16"):
        reasons.append(f"computes in float32, float16 or bfloat16, not in {problem.dtype}")
    return reasons


def interpreter_asked() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _missing_in_interpreter() -> list[str]:
    if _COMMON in sys.modules and not sys.modules[_COMMON].INTERPRETED:
        return ["TRITON_INTERPRET=1 was set after the kernels were loaded; set it before the process starts"]
    if importlib.util.find_spec("triton") is None:
        return []
    import numpy
    import triton

    # Loop bounds: triton.runtime.interpreter calls int() on an array of one value, which NumPy 2.4 refuses.
    if _major_minor(triton.__version__) < (3, 7) and _major_minor(numpy.__version__) >= (2, 4):
        return [f"the interpreter of Triton {triton.__version__} needs NumPy < 2.4, this is {numpy.__version__}"]
    return []


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _missing_on_cuda(dtype: str) -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 5):
        return ["Triton needs a GPU of compute capability 7.5 or more"]
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["this GPU has no bfloat16 arithmetic; use float16"]
    return []
