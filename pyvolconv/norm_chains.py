"""Chains that start at an InstanceNorm3d: with a ReLU, LeakyReLU or PReLU behind it in one pass where that is ordinary.

They run as `instance_norm_activation` where that takes the call, else module by module.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .epilogue import NEGATIVE_SLOPE
from .instance_norm import instance_norm_activation
from .links import activation_name


def run_norm_chain(chain: Sequence[nn.Module], x: Tensor, keep_channels_last: bool | None = None) -> Tensor:
    """What calling the modules one after the other returns.

    Args:
        chain: an InstanceNorm3d, and perhaps dropout that drops nothing and an activation.
        x: what the first is called on.
        keep_channels_last: whether the result of a channels_last_3d tensor is so too; by default as the first says.
    """
    norm, *links = chain
    activation = links[-1] if links else None
    assert isinstance(norm, nn.InstanceNorm3d)
    # Of another number of channels the module complains or warns.
    if x.dim() == 5 and x.shape[1] == norm.num_features:
        keeps = getattr(norm, "keeps_channels_last", False) if keep_channels_last is None else keep_channels_last
        y = instance_norm_activation(
            x,
            norm.weight,
            norm.bias,
            activation.weight if isinstance(activation, nn.PReLU) else None,
            eps=norm.eps,
            activation="none" if isinstance(activation, nn.PReLU) else activation_name(activation),
            negative_slope=activation.negative_slope if isinstance(activation, nn.LeakyReLU) else NEGATIVE_SLOPE,
            keep_channels_last=keeps,
        )
        if y is not None:
            return y
    x = norm.forward(x)
    for module in links:
        x = module(x)
    return x
