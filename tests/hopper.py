"""Triton kernels compiled for a Hopper GPU on a machine without one, in a process that does not interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

COMPILED = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}

def compiled(launch):
    # What triton.jit does at a call: 1 becomes a constant, multiples of 16 are noted, tensors are aligned.
    constants, attributes = {}, {}
    def describe(value, path):
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, position)) for position, item in enumerate(value))
        if not isinstance(value, torch.Tensor) and value == 1:
            constants[path] = 1
            return "constexpr"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32" if value < 2**31 else "i64"
    signature = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        else:
            signature[parameter.name] = describe(value, (position,))
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
"""
"""compiled(launch): down to machine code for compute capability 9.0."""


def compile_on(code: str, cases: Iterable[str], cache: Path) -> list[list[str]]:
    """The words of each line that `code` prints, after COMPILED, with cases in sys.argv."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", COMPILED + code, *cases], capture_output=True, text=True, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]
