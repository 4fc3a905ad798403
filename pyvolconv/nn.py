"""Modules: torch's own convolution modules with the arithmetic replaced.

They subclass torch's, so attributes, repr, state_dict, initialisation and isinstance stay torch's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .functional import conv3d, conv_transpose3d


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
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0, 0)
        return conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


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
        # Modules can be built with another padding_mode only by setting the attribute; torch refuses it here.
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose3d")
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
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )
