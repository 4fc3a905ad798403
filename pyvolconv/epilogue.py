"""What may follow a convolution in the same pass: an activation and a max-pool, as values.

`MaxPool` has the sizes of `torch.nn.MaxPool3d`. Along an axis of `size` voxels a window starts every `stride`
voxels from `-padding` on, and

    windows = (size + 2 * padding - window) / stride + 1,

rounded down, or up with `ceil_mode`; rounded up, a last window that would start in the padding at the end is
left out. Padding never wins: a window's maximum is that of its voxels inside the input.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

Size3 = tuple[int, int, int]
Activation = Literal["none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
KEEPS_PREACTIVATION: frozenset[Activation] = frozenset({"silu", "gelu", "gelu_tanh"})
"""Activations whose derivative does not follow from their value: the pre-activation is kept in its place."""
NEGATIVE_SLOPE = 0.01
LARGEST_WINDOW = 255
"""Voxels; the chosen one is kept as an index of one byte."""
NO_VOXEL = 255
"""Kept in place of an index where relu makes the whole window zero, so that no voxel gets a gradient."""

_POOL = re.compile(r"(?P<window>[\dx]+)(?:s(?P<stride>[\dx]+))?(?:p(?P<padding>[\dx]+))?(?P<ceil>ceil)?")


@dataclass(frozen=True)
class MaxPool:
    """The sizes of one max-pooling over (depth, height, width); its dilation is 1.

    Attributes:
        window: voxels along each axis, at most 255 together.
        stride: voxels between windows.
        padding: voxels before and after each axis, at most half of the window.
        ceil_mode: whether the number of windows is rounded up.

    Raises:
        ValueError: a size is impossible; the message names it, what was given and what is expected.

    Example:
        >>> pool = MaxPool((2, 2, 2), (2, 2, 2), ceil_mode=True)
        >>> str(pool), pool.output_size((15, 15, 30))
        ('2ceil', (8, 8, 15))
        >>> MaxPool.parse("3s2p1")
        MaxPool(window=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), ceil_mode=False)
    """

    window: Size3
    stride: Size3
    padding: Size3 = (0, 0, 0)
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "stride"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"pool {name}={getattr(self, name)} must be at least 1 on every axis")
        if math.prod(self.window) > LARGEST_WINDOW:
            raise ValueError(f"pool window={self.window} has more than {LARGEST_WINDOW} voxels")
        if any(not 0 <= 2 * pad <= size for pad, size in zip(self.padding, self.window, strict=True)):
            raise ValueError(f"pool padding={self.padding} must lie between 0 and half of window={self.window}")

    def output_size(self, size: Size3) -> Size3:
        """The number of windows along each axis of a pooled tensor of `size` voxels."""
        axes = zip(size, self.window, self.stride, self.padding, strict=True)
        depth, height, width = (self._windows(*axis) for axis in axes)
        return depth, height, width

    def _windows(self, size: int, window: int, stride: int, padding: int) -> int:
        windows = (size + 2 * padding - window + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        if self.ceil_mode and (windows - 1) * stride >= size + padding:
            windows -= 1
        return windows

    @property
    def overlap(self) -> int:
        """The largest number of windows that one voxel lies in."""
        return math.prod(-(-window // stride) for window, stride in zip(self.window, self.stride, strict=True))

    def __str__(self) -> str:
        text = format_axes(self.window)
        if self.stride != self.window:
            text += "s" + format_axes(self.stride)
        if self.padding != (0, 0, 0):
            text += "p" + format_axes(self.padding)
        return text + ("ceil" if self.ceil_mode else "")

    @classmethod
    def parse(cls, text: str) -> MaxPool:
        """The pool that `str(pool)` wrote.

        Raises:
            ValueError: the text is not of that form.
        """
        match = _POOL.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a max-pool; expected a form like '2ceil' or '3s2p1'")
        window = parse_size(match["window"])
        stride = parse_size(match["stride"]) if match["stride"] else window
        return cls(window, stride, parse_size(match["padding"] or "0"), match["ceil"] is not None)


def check_activation(activation: str, negative_slope: float) -> None:
    """Whether an activation can be part of a pass.

    Raises:
        ValueError: it is none of `ACTIVATIONS`, or the slope of leaky_relu is negative or not finite: the sign of a
            value would not say any more which side it came from.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {ACTIVATIONS}")
    if not 0 <= negative_slope < math.inf:
        raise ValueError(f"negative_slope={negative_slope} must be finite and not negative")


def format_axes(axes: tuple[object, object, object]) -> str:
    """ "3" for three equal axes, else "1x3x3"."""
    texts = [str(axis) for axis in axes]
    return texts[0] if len(set(texts)) == 1 else "x".join(texts)


def split_axes(text: str) -> list[str]:
    """The three axes that `format_axes` wrote, each as text.

    Raises:
        ValueError: there are not one or three.
    """
    axes = text.split("x")
    if len(axes) == 1:
        axes *= 3
    if len(axes) != 3:
        raise ValueError(f"{text!r} has {len(axes)} axes; expected 1 or 3, like '3' or '1x3x3'")
    return axes


def parse_size(text: str) -> Size3:
    """Three numbers out of "3" or "1x3x3"."""
    depth, height, width = (int(axis) for axis in split_axes(text))
    return depth, height, width
