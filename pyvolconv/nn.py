"""Modules: torch's own convolution modules with the arithmetic replaced, and what costs most beside them.

They subclass torch's, so attributes, repr, state_dict, initialisation and isinstance stay torch's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm import run_batch_norm
from .elsewhere import is_recorded_for_elsewhere, script_as
from .functional import conv3d, conv_transpose3d
from .instance_norm import instance_norm_activation


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` computed by this package's kernels: same arguments, attributes and parameters.

    Shapes: input (N, C_in, D, H, W) or (C_in, D, H, W), output (N, C_out, D_out, H_out, W_out).

    Raises:
        What `torch.nn.Conv3d` raises; UnsupportedProblemError when a forced backend cannot run it.

    Example:
        >>> import torch, pyvolconv
        >>> layer = pyvolconv.Conv3d(1, 16, kernel_size=3, padding=1)
        >>> layer
        Conv3d(1, 16, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1))
        >>> layer(torch.zeros(2, 1, 8, 8, 8)).shape
        torch.Size([2, 16, 8, 8, 8])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return conv3d(input, weight, bias, self.stride, (0, 0, 0), self.dilation, self.groups)
        return conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` computed by this package's kernels: same arguments and parameters.

    Shapes: input (N, C_in, D, H, W) or (C_in, D, H, W), output (N, C_out, D_out, H_out, W_out).

    Raises:
        What `torch.nn.ConvTranspose3d` raises; UnsupportedProblemError when a forced backend cannot run it.

    Example:
        >>> import torch, pyvolconv
        >>> pyvolconv.ConvTranspose3d(4, 3, kernel_size=2, stride=2)(torch.zeros(1, 4, 5, 5, 5)).shape
        torch.Size([1, 3, 10, 10, 10])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        # Attributes may have been set after construction; what torch refuses then, it refuses here.
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose3d")
        if not isinstance(self.padding, tuple):
            raise AssertionError("self.padding must be a tuple")
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            3,
            self.dilation,  # type: ignore[arg-type]
        )
        return conv_transpose3d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


class LazyConv3d(nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """`torch.nn.LazyConv3d` that becomes this package's `Conv3d` with its first call.

    Shapes: input (N, C_in, D, H, W) or (C_in, D, H, W), output (N, C_out, D_out, H_out, W_out).

    Raises:
        What `torch.nn.LazyConv3d` raises; UnsupportedProblemError when a forced backend cannot run it.

    Example:
        >>> import torch, pyvolconv
        >>> layer = pyvolconv.LazyConv3d(16, kernel_size=3)
        >>> layer(torch.zeros(2, 5, 8, 8, 8)).shape
        torch.Size([2, 16, 6, 6, 6])
        >>> layer
        Conv3d(5, 16, kernel_size=(3, 3, 3), stride=(1, 1, 1))
    """

    cls_to_become = Conv3d


class LazyConvTranspose3d(nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose3d` that becomes this package's `ConvTranspose3d` with its first call.

    Shapes: input (N, C_in, D, H, W) or (C_in, D, H, W), output (N, C_out, D_out, H_out, W_out).

    Raises:
        What `torch.nn.LazyConvTranspose3d` raises; UnsupportedProblemError when a forced backend cannot run it.

    Example:
        >>> import torch, pyvolconv
        >>> layer = pyvolconv.LazyConvTranspose3d(3, kernel_size=2, stride=2)
        >>> layer(torch.zeros(1, 4, 5, 5, 5)).shape
        torch.Size([1, 3, 10, 10, 10])
    """

    cls_to_become = ConvTranspose3d


class InstanceNorm3d(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` by this package's pass on the CPU, forward and backward: same arguments and results.

    Dense float32 and float64 tensors go this way, in ordinary calls: under `torch.compile`, transforms, autocast,
    tracers and modes torch's own runs, and for everything that keeps running statistics. Sums are of doubles, so a
    mean of many deviations costs no accuracy, and bits are the same at every thread count.

    Attributes:
        keeps_channels_last: False; set to True, results of tensors in channels_last_3d stay so, while torch's are
            contiguous.

    Shapes: input and output (N, C, D, H, W) or (C, D, H, W).

    Raises:
        What `torch.nn.InstanceNorm3d` raises.

    Example:
        >>> import torch, pyvolconv
        >>> pyvolconv.InstanceNorm3d(4, affine=True)(torch.randn(2, 4, 5, 5, 5)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

    keeps_channels_last: bool = False

    def _normalize(self, input: Tensor) -> Tensor:
        if self.running_mean is None and self.running_var is None and not is_recorded_for_elsewhere():
            keep = self.keeps_channels_last
            y = instance_norm_activation(input, self.weight, self.bias, eps=self.eps, keep_channels_last=keep)
            if y is not None:
                return y
        result: Tensor = super()._apply_instance_norm(input)  # type: ignore[no-untyped-call]
        return result

    _apply_instance_norm = script_as(nn.InstanceNorm3d._apply_instance_norm, _normalize)


class BatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` by this package's pass on the CPU in training mode, forward and backward: same arguments,
    results and running statistics.

    What is dense, ordinary and large goes this way, as with `InstanceNorm3d`; what has fewer than 2^19 values or short
    planes runs in torch, where the call would take longer than the pass saves (`batch_norm`), and so does everything
    that normalizes by running statistics, as in eval mode.

    Shapes: input and output (N, C, D, H, W).

    Raises:
        What `torch.nn.BatchNorm3d` raises.

    Example:
        >>> import torch, pyvolconv
        >>> pyvolconv.BatchNorm3d(4)(torch.randn(2, 4, 5, 5, 5)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

    def _normalize(self, input: Tensor) -> Tensor:
        if not is_recorded_for_elsewhere():
            y = run_batch_norm(self, input)
            if y is not None:
                return y
        result: Tensor = super().forward(input)
        return result

    forward = script_as(nn.BatchNorm3d.forward, _normalize)
