"""How near a network's values are to where its derivative jumps.

The gradients of a network with ReLU, LeakyReLU, PReLU, clamp or a max pool are not continuous. A value that float32 and
float64 put on different sides of a kink changes every gradient before it, by far more than rounding and through no
fault of a kernel; among 100,000 values one such is an ordinary thing. So networks and inputs are drawn until no value
is so near to a kink that rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NEAR = 8.0
"""Root mean square deviations between torch's float32 and float64, of the values of one call."""

aten = torch.ops.aten


def _of_relu(x: Tensor, *_: Any) -> Tensor:
    return x


def _of_clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    return torch.cat([(x - limit).flatten() for limit in (low, high) if limit is not None])


def _of_max_pool(
    x: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0, 0), *_: Any
) -> Tensor:
    """The largest of each window less the next one."""
    windows = F.pad(x, [margin for margin in reversed(padding) for _ in range(2)], value=-torch.inf)
    for axis in range(3):
        windows = windows.unfold(2 + axis, size[axis], stride[axis])
    first, second = windows.flatten(-3).topk(2).values.unbind(-1)
    return first - second


DISTANCES: dict[Any, Callable[..., Tensor]] = {
    aten.relu: _of_relu,
    aten.relu_: _of_relu,
    aten.leaky_relu: _of_relu,
    aten.leaky_relu_: _of_relu,
    aten._prelu_kernel: _of_relu,
    aten.clamp: _of_clamp,
    aten.max_pool3d_with_indices: _of_max_pool,
}


class Distances(TorchDispatchMode):
    """Keeps, for each call inside this block of what has a kink, the signed distances of its values from it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        distance = DISTANCES.get(function.overloadpacket)
        if distance is not None:
            self.calls.append(distance(*args).detach().double().clone())
        return function(*args, **(kwargs or {}))


def decided_by_rounding(exact: Distances, rounded: Distances) -> bool:
    """Whether a value of a float64 run is so near to a kink that one of float32 may lie on its other side."""
    for true, seen in zip(exact.calls, rounded.calls, strict=True):
        # Infinite: a pool's window with one voxel. Zero in both: what an earlier ReLU has cut off has no gradient.
        matters = true.isfinite() & seen.isfinite() & ((true != 0) | (seen != 0))
        true, seen = true[matters], seen[matters]
        if bool((true.abs() <= NEAR * (seen - true).square().mean().sqrt()).any()):
            return True
    return False
