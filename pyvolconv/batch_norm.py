"""A BatchNorm3d that normalizes by the statistics of its batch, and the activation behind it, in one pass."""

from __future__ import annotations

from torch import Tensor, nn

from .epilogue import NEGATIVE_SLOPE, Activation
from .instance_norm import RunningStatistics, batch_norm_activation
from .ordinary import is_ordinary

FEWEST_VALUES = 1 << 19
"""From so many on this pass is faster than torch's: below, calling it takes longer than what it saves."""
FEW_CHANNELS = 16
"""With fewer, innermost, torch's backward pass takes several times as long."""
FEWEST_VOXELS, FEWEST_VOXELS_ALONE = 768, 4096
"""Of a plane whose voxels lie together, with an activation and without."""


def uses_batch_statistics(norm: nn.BatchNorm3d) -> bool:
    """Whether a call normalizes by the batch at hand, as in training mode, and not by running statistics."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def run_batch_norm(
    norm: nn.BatchNorm3d,
    x: Tensor,
    slopes: Tensor | None = None,
    activation: Activation = "none",
    negative_slope: float = NEGATIVE_SLOPE,
) -> Tensor | None:
    """What the module returns in this call, with an activation behind it; its running statistics follow as torch's do.

    Args:
        norm: the module; its hooks are not called.
        x: (N, C, D, H, W).
        slopes: the weight of a PReLU, (1,) or (C,), in place of `activation`; or None.
        activation: none, relu or leaky_relu.
        negative_slope: of leaky_relu.

    Returns:
        The result; None, and nothing has changed, where torch has to compute or to refuse it.

    Example:
        >>> import torch
        >>> norm, x = torch.nn.BatchNorm3d(3), torch.randn(2, 3, 44, 45, 46)
        >>> y = run_batch_norm(norm, x, activation="relu")
        >>> torch.allclose(y, torch.relu(torch.nn.BatchNorm3d(3)(x)), atol=1e-5), int(norm.num_batches_tracked)
        (True, 1)
        >>> run_batch_norm(norm.eval(), x) is None
        True
    """
    # Asked first: sizes that a compiler makes a program for must not decide anything.
    if not isinstance(x, Tensor) or not is_ordinary(x, under_profiler=True) or not _is_torchs_own(norm):
        return None
    if x.dim() != 5 or not _is_faster(x, slopes is None and activation == "none"):
        return None
    running = None
    if norm.training and norm.track_running_stats:
        if norm.running_mean is None or norm.running_var is None:
            return None
        running = RunningStatistics(norm.running_mean, norm.running_var, _factor(norm), norm.num_batches_tracked)
    return batch_norm_activation(
        x,
        norm.weight,
        norm.bias,
        slopes,
        running=running,
        eps=norm.eps,
        activation=activation,
        negative_slope=negative_slope,
    )


def _is_torchs_own(norm: nn.BatchNorm3d) -> bool:
    """Whether the call is what torch's class says, and nothing that torch refuses or a subclass checks."""
    return (
        uses_batch_statistics(norm)
        and isinstance(norm.eps, (float, int))
        and norm.eps > 0
        and isinstance(norm.momentum, (float, int, type(None)))
        and getattr(norm._check_input_dim, "__func__", None) is nn.BatchNorm3d._check_input_dim
    )


def _factor(norm: nn.BatchNorm3d) -> float:
    """The share of the next batch in the running statistics."""
    if norm.momentum is None and norm.num_batches_tracked is not None:
        return 1 / (float(norm.num_batches_tracked) + 1)
    return norm.momentum or 0.0


def _is_faster(x: Tensor, is_alone: bool) -> bool:
    """By measurements beside torch (docs/performance.md); its modules take what is small."""
    if x.is_contiguous():
        voxels = x.shape[2] * x.shape[3] * x.shape[4]
        return x.numel() >= FEWEST_VALUES and voxels >= (FEWEST_VOXELS_ALONE if is_alone else FEWEST_VOXELS)
    return x.numel() >= (FEWEST_VALUES // 8 if x.shape[1] < FEW_CHANNELS else FEWEST_VALUES)
