"""Run a model forward and backward on an example, leave no trace in it, and hear what it asks of the dispatcher.

Buffers that the run changes (BatchNorm's statistics) get their values back, and so do the random generators of torch,
NumPy and Python. Gradients are computed for the parameters that require them and thrown away: nobody's `.grad` changes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .dispatch import listen
from .problem import ConvProblem, Pass


def forward(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Shapes and dtypes of what `model(*arguments)` returns, computed without gradients."""
    with no_trace(model), torch.no_grad():
        return _describe(model(*arguments))


def forward_and_backward(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, set[tuple[ConvProblem, Pass]]]:
    """As `forward`, and the passes that the dispatcher was asked for by the model and its backward pass.

    The backward pass runs where gradients are enabled and a result depends on a parameter that requires one.
    """
    with no_trace(model), listen() as asked:
        result = model(*arguments)
        results = [
            leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if results and parameters:
            torch.autograd.grad(results, parameters, [torch.ones_like(leaf) for leaf in results], allow_unused=True)
    return _describe(result), asked


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Give buffers and random generators back the values they had before the block."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            # Its version does not tell: BatchNorm's kernel leaves it alone. Writing would spoil graphs that saved it.
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _describe(result: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda value: (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else type(value), result
    )
