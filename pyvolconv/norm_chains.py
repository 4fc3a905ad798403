"""Chains that start at a norm: with a ReLU, LeakyReLU or PReLU behind it in one pass where that is ordinary.

The norm is an InstanceNorm3d, or a BatchNorm3d that normalizes by the statistics of its batch. A chain runs as
`instance_norm_activation` or `run_batch_norm` where that takes the call, else module by module.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .batch_norm import run_batch_norm
from .epilogue import NEGATIVE_SLOPE, Activation
from .instance_norm import instance_norm_activation
from .links import activation_name


def run_norm_chain(chain: Sequence[nn.Module], x: Tensor, keep_channels_last: bool | None = None) -> Tensor:
    """What calling the modules one after the other returns.

    Args:
        chain: an InstanceNorm3d or BatchNorm3d, and perhaps dropout that drops nothing and an activation.
        x: what the first is called on.
        keep_channels_last: whether an InstanceNorm3d's result of a channels_last_3d tensor is so too; by default as the
            module says.
    """
    norm, *links = chain
    y = _in_one_pass(norm, links[-1] if links else None, x, keep_channels_last)
    if y is not None:
        return y
    x = norm.forward(x)
    for module in links:
        x = module(x)
    return x


def _in_one_pass(
    norm: nn.Module, activation: nn.Module | None, x: Tensor, keep_channels_last: bool | None
) -> Tensor | None:
    slopes: Tensor | None = activation.weight if isinstance(activation, nn.PReLU) else None
    name: Activation = "none" if isinstance(activation, nn.PReLU) else activation_name(activation)
    slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else NEGATIVE_SLOPE
    if isinstance(norm, nn.BatchNorm3d):
        return run_batch_norm(norm, x, slopes, name, slope)
    assert isinstance(norm, nn.InstanceNorm3d)
    # Of another number of channels the module complains or warns.
    if x.dim() != 5 or x.shape[1] != norm.num_features:
        return None
    keeps = getattr(norm, "keeps_channels_last", False) if keep_channels_last is None else keep_channels_last
    return instance_norm_activation(
        x,
        norm.weight,
        norm.bias,
        slopes,
        eps=norm.eps,
        activation=name,
        negative_slope=slope,
        keep_channels_last=keeps,
    )
