"""Who competes for a pass of a problem, each on the same random tensors: what `autotune` times.

A backend that can launch its kernels in several ways (`Backend.configurations`) competes in each of them, as
"name@configuration" beside "name", which is the way that it takes untuned.

A pass fused with a pool has one more candidate, "aten": the pass put together from torch's convolution, activation and
pooling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends.base import MEMORY_FORMAT, Backend
from .fused_ops import conv3d_max_pool, conv3d_max_pool_grad_input, conv3d_max_pool_grad_weight
from .problem import ConvProblem, Pass

HOPELESS = 100.0
"""A backend that the cost model expects to take this many times as long as its favourite is not timed."""

MOST_CONFIGURATIONS = 8
"""Of one backend for one pass, beside its own choice."""

Step = Callable[[], object]


def competitors(problem: ConvProblem, pass_: Pass, able: Sequence[Backend], expected: Backend | None) -> list[Backend]:
    """The backends worth timing, each followed by its configurations.

    Args:
        problem, pass_: what to run.
        able: the backends that can.
        expected: the cost model's favourite among them, None where there is none.
    """
    if expected is not None:
        least = expected.expected_efficiency(problem, pass_) / HOPELESS
        able = [one for one in able if not one.ours or one.expected_efficiency(problem, pass_) >= least]
    return [
        competitor
        for backend in able
        for competitor in (
            backend,
            *map(backend.configured, backend.configurations(problem, pass_)[:MOST_CONFIGURATIONS]),
        )
    ]


def prepare(backends: Sequence[Backend], problem: ConvProblem, pass_: Pass) -> None:
    """Have what the backends compile at a first call compiled, several at a time.

    Threads are enough: compilers let go of the interpreter's lock for most of their time. Who cannot be compiled says
    so again when it runs.
    """
    todo = [backend for backend in backends if type(backend).prepare is not Backend.prepare]
    if not todo:
        return
    device = torch.cuda.current_device() if problem.device == "cuda" else None

    def work(backend: Backend) -> None:
        with nullcontext() if device is None else torch.cuda.device(device):
            backend.prepare(problem, pass_)

    with ThreadPoolExecutor(min(len(todo), os.cpu_count() or 1)) as pool:
        for backend in todo:
            pool.submit(work, backend)


def steps_of(problem: ConvProblem, pass_: Pass, backends: Sequence[Backend]) -> dict[str, Step]:
    """Label of a backend -> the pass on random tensors, the same for all.

    Args:
        problem, pass_: what to run.
        backends: who can.
    """
    generator = torch.Generator(problem.device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        dtype = getattr(torch, problem.dtype)
        values = torch.empty(shape, device=problem.device)
        values.normal_(generator=generator)
        return values.to(dtype) if len(shape) == 1 else dense(values.to(dtype))

    def dense(values: Tensor) -> Tensor:
        # Not contiguous(): of one channel or one voxel that keeps strides which name the other layout.
        return torch.empty(
            values.shape, dtype=values.dtype, device=values.device, memory_format=MEMORY_FORMAT[problem.layout]
        ).copy_(values)

    weight = draw(problem.weight_shape)
    bias = draw((problem.out_channels,)) if problem.bias else None
    if problem.pool is None:
        operands: tuple[Any, ...]
        if pass_ == "forward":
            operands = (draw(problem.input_shape), weight, bias)
        else:
            other = weight if pass_ == "grad_input" else draw(problem.input_shape)
            operands = (draw(problem.output_shape), other)
        return {
            backend.label: _bound(dispatch.run, getattr(backend, pass_), problem, pass_, *operands)
            for backend in backends
        }
    x = draw(problem.input_shape)
    geometry = (
        problem.stride,
        [side for pair in problem.padding for side in pair],
        problem.dilation,
        problem.groups,
    )
    pool = (problem.pool.window, problem.pool.stride, problem.pool.padding, problem.pool.ceil_mode)
    epilogue = (problem.activation, problem.negative_slope)
    if pass_ == "forward":
        together = _bound(conv3d_max_pool, x, weight, bias, *geometry, *epilogue, *pool)
        fused: tuple[Any, ...] = (x, weight, bias)
    else:
        with torch.no_grad():
            code = dense(conv3d_max_pool(x, weight, None, *geometry, "none", 0.01, *pool)[1])
        grad = draw(problem.pooled_shape)
        if pass_ == "grad_input":
            fused = (grad, code, weight)
            together = _bound(conv3d_max_pool_grad_input, *fused, problem.input_size, *geometry, *pool)
        else:
            fused = (grad, code, x)
            sizes = (problem.kernel_size, problem.bias, *geometry, *pool)
            together = _bound(conv3d_max_pool_grad_weight, *fused, *sizes)
    method = f"{pass_}_max_pool"
    steps = {
        backend.label: _bound(dispatch.run, getattr(backend, method), problem, pass_, *fused) for backend in backends
    }
    peers = [backend for backend in dispatch.able_backends(problem.without_epilogue(), pass_) if not backend.ours]
    return steps | {peer.name: _forced(peer.name, together) for peer in peers}


def _bound(function: Callable[..., object], *args: Any) -> Step:
    return lambda: function(*args)


def _forced(name: str, step: Step) -> Step:
    def run() -> object:
        with dispatch.use_backend(name):
            return step()

    return run
