"""A training step as one CUDA graph: the host launches one thing in place of each kernel.

A step of a small network is bound by launches: the host needs longer to ask for its kernels than the GPU for running
them. What remains when a step is captured once and replayed is the GPU's own time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3


class Capture(Protocol):
    """Runs a function once on a side stream, keeps what it launches, and gives what replays that."""

    def __call__(self, function: Callable[[], object]) -> Callable[[], None]: ...


class GraphedStep:
    """A step that is captured when it is called first, and replayed then and in every later call.

    Before it can be captured it must have run: kernels are compiled and algorithms chosen. These runs are undone, so
    that the first call is the first step, as without a graph. `step` must read and write the same tensors in every
    call and never wait for the GPU; its gradients live in memory of the graph.

    Args:
        model: whose parameters `step` updates.
        optimizer: with `capturable=True`, new.
        step: zero_grad(set_to_none=True), forward, loss, backward, update.
        warm_up: runs a function some times, off the stream that is captured; CUDA's unless given.
        capture: CUDA's unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], object],
        warm_up: Callable[[Callable[[], object]], None] | None = None,
        capture: Capture | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._step = step
        self._warm_up = warm_up or _run_on_a_side_stream
        self._capture = capture or _capture
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._replay is None:
            weights = [parameter.detach().clone() for parameter in self._model.parameters()]
            self._warm_up(self._step)
            # What the warm-up left would otherwise be added to.
            self._optimizer.zero_grad(set_to_none=True)
            self._replay = self._capture(self._step)
            self._start_afresh(weights)
        self._replay()

    def _start_afresh(self, weights: list[Tensor]) -> None:
        """Initial weights and an optimizer that has done nothing, in the tensors that the graph knows."""
        with torch.no_grad():
            for parameter, weight in zip(self._model.parameters(), weights, strict=True):
                parameter.copy_(weight)
            for state in self._optimizer.state.values():
                for value in state.values():
                    value.zero_()


def _run_on_a_side_stream(step: Callable[[], object]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def _capture(step: Callable[[], object]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
