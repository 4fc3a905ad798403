"""What Triton makes of our kernels for a Hopper GPU, read without one: `python -m benchmarks.gpu_code`.

For each entry of gpu_problems.py, pass and layout, what the cost models take among our Triton backends, compiled for
compute capability 9.0: registers and spilled bytes of a thread, shared memory of a program, how the products are
multiplied, and whether a step's operands are fetched by an earlier one: "ahead" if the loop waits before it fetches.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from pyvolconv import dispatch
from pyvolconv.backends.base import MEMORY_FORMAT, empty, operand_shapes
from pyvolconv.backends.triton_base import RESULT, TritonLaunches
from pyvolconv.problem import LAYOUTS, PASSES, ConvProblem, Pass

from .gpu_floors import hopper
from .gpu_problems import GPU_PROBLEMS, gpu_problem

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


def compiled(launch: Any) -> Any:
    """A launch compiled as `triton.jit` does at a call: 1 is a constant, multiples of 16 are noted, tensors aligned."""
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
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
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "i32" if abs(value) < 2**31 else "i64"

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


def launches_of(backend: TritonLaunches, problem: ConvProblem, pass_: Pass) -> list[Any]:
    """Those of a pass, on tensors without memory."""
    like = torch.empty(0, dtype=getattr(torch, problem.dtype), device="meta")
    operands: list[Any] = [
        torch.empty(shape, dtype=like.dtype, device="meta", memory_format=MEMORY_FORMAT[problem.layout])
        for shape in operand_shapes(problem, pass_)
    ]
    if pass_ == "forward":
        operands.append(None)
    return backend.launches(problem, pass_, operands, empty(problem, RESULT[pass_], like))


def order_of_loop(ttgir: str) -> str:
    """ "ahead" if the innermost loop with a product waits for operands before it fetches any, "late" if after.

    Empty where there is no such loop, or it fetches nothing asynchronously.
    """
    bodies = [part.split("scf.yield")[0] for part in ttgir.split("scf.for")[1:]]
    bodies = [body for body in bodies if "warp_group_dot " in body or "tt.dot " in body]
    if not bodies:
        return ""
    places = {}
    for what, names in (("wait", r"wait_barrier|async_wait"), ("fetch", r"async_tma_copy|async_copy_global")):
        found = re.search(names, bodies[-1])
        if found is None:
            return ""
        places[what] = found.start()
    return "ahead" if places["wait"] < places["fetch"] else "late"


def resources(cubin: bytes) -> str:
    """Registers and spilled bytes of a thread, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers is not None
    assert stack is not None
    return f"{registers[1]:>4} registers {stack[1]:>5} spilled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GPU_PROBLEMS), help="comma-separated entries (default: all)")
    parser.add_argument("--passes", default=",".join(PASSES), help="comma-separated passes (default: all)")
    parser.add_argument("--configurations", action="store_true", help="all configurations, not the default alone")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    print(f"Triton {triton.__version__}, compute capability 9.0")
    with hopper():
        for name in options.only.split(","):
            for pass_ in (one for one in PASSES if one in options.passes.split(",")):
                for layout in LAYOUTS:
                    problem = gpu_problem(name, layout)
                    able = [one for one in dispatch.able_backends(problem, pass_) if isinstance(one, TritonLaunches)]
                    best = dispatch.expected_fastest(problem, pass_, able)
                    ways = best.configurations(problem, pass_) if options.configurations else ()
                    for backend in (best, *map(best.configured, ways)):
                        assert isinstance(backend, TritonLaunches)
                        for launch in launches_of(backend, problem, pass_):
                            print(f"{name:15} {pass_:11} {layout} {backend.label:20}", row(launch), flush=True)


def row(launch: Any) -> str:
    code = compiled(launch)
    matrix = "wgmma" if "wgmma" in code.asm["ptx"] else "mma" if "mma.sync" in code.asm["ptx"] else "fma"
    order = order_of_loop(code.asm["ttgir"])
    shared = code.metadata.shared / 1024
    return f"{launch.kernel.__name__:28} {resources(code.asm['cubin'])} {shared:6.1f} KB {matrix:5} {order}"


if __name__ == "__main__":
    main()
