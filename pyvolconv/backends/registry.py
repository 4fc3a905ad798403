"""Every backend, fastest first, torch last.

Dispatcher, tests, benchmarks and `pyvolconv info` iterate this tuple: a new kernel is one file and one
line here, and is at once selectable, tested and timed.
"""

from __future__ import annotations

from .aten import AtenBackend
from .base import Backend
from .cpp import CppDirect
from .cpp_amx import CppAmx
from .cpp_bfloat16 import CppBfloat16
from .cpp_first_layer import CppFirstLayer
from .cpp_widened import CppWidened
from .cpp_winograd import CppWinograd
from .gemm import GemmBackend
from .im2col import Im2colBackend
from .numba import NumbaBackend
from .triton_depthwise import TritonDepthwise
from .triton_implicit_gemm import TritonImplicitGemm
from .triton_tma import TritonTma

REGISTRY: tuple[Backend, ...] = (
    GemmBackend(),
    TritonTma(),
    TritonDepthwise(),
    TritonImplicitGemm(),
    CppDirect(),
    CppWinograd(),
    CppFirstLayer(),
    CppAmx(),
    CppBfloat16(),
    CppWidened(),
    Im2colBackend(),
    NumbaBackend(),
    AtenBackend(),
)


def select(name_or_family: str) -> tuple[Backend, ...]:
    """The backends that a name ("cpp.direct") or a family ("cpp") means, in registry order.

    Raises:
        ValueError: no backend has that name or family; the message lists those that exist.
    """
    found = tuple(backend for backend in REGISTRY if name_or_family in (backend.name, backend.family))
    if not found:
        names = ", ".join(dict.fromkeys(part for backend in REGISTRY for part in (backend.family, backend.name)))
        raise ValueError(f"unknown backend {name_or_family!r}; expected one of: {names}")
    return found
