"""One 3-D convolution as a value.

`ConvProblem` holds every size that decides how a convolution is computed and no tensor, so it can be
hashed, compared, written to a log and parsed back. Everything that follows from the sizes (output size,
FLOPs, least memory traffic, length of the reduction) is derived here and nowhere else.

Sizes follow `torch.nn.functional.conv3d` (cross-correlation):

    y[n, o, i] = bias[o] + sum over c, k of  x[n, c, i * stride - padding_begin + k * dilation] * w[o, c, k]

with i and k running over (depth, height, width). An epilogue may follow in the same pass: an activation, then a
max-pool. A pass of such a problem is the fused one: "forward" goes from x to the pooled values, the gradients start
from the gradient of the chosen voxels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Literal, get_args

from .epilogue import (
    ACTIVATIONS,
    NEGATIVE_SLOPE,
    Activation,
    MaxPool,
    check_activation,
    format_axes,
    parse_size,
    split_axes,
)
from .epilogue import (
    Size3 as Size3,
)

Pass = Literal["forward", "grad_input", "grad_weight"]
Layout = Literal["ncdhw", "ndhwc"]
Padding3 = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

PASSES: tuple[Pass, ...] = get_args(Pass)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "complex128": 16,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}

_PATTERN = re.compile(
    r"(?P<device>[a-z]+)-(?P<dtype>[a-z]+\d+)-(?P<layout>ncdhw|ndhwc)"
    r"-n(?P<batch>\d+)(?:g(?P<groups>\d+))?ic(?P<in_channels>\d+)oc(?P<out_channels>\d+)"
    r"-i(?P<input_size>[\dx]+)-k(?P<kernel_size>[\dx]+)"
    r"(?:-s(?P<stride>[\dx]+))?(?:-p(?P<padding>[\dx+]+))?(?:-d(?P<dilation>[\dx]+))?(?P<bias>-bias)?"
    rf"(?:-(?P<activation>{'|'.join(ACTIVATIONS[1:])})(?:\((?P<negative_slope>[^()]+)\))?)?"
    r"(?:-pool(?P<pool>[\dx]+(?:s[\dx]+)?(?:p[\dx]+)?(?:ceil)?))?"
)


@dataclass(frozen=True)
class ConvProblem:
    """The sizes of one 3-D convolution.

    Attributes:
        batch: number of samples N.
        in_channels, out_channels: channels of input and output, all groups together.
        input_size: (depth, height, width) of the input, in voxels, without padding.
        kernel_size: (depth, height, width) of the kernel, in taps.
        stride, dilation: per axis, as in PyTorch (dilation 1 is a dense kernel).
        padding: ((begin, end), ...) zeros added before and after each axis.
        groups: both channel counts are divisible by it.
        dtype: name of the torch dtype, e.g. "float32".
        layout: memory order of activations *and* weights; "ndhwc" is torch.channels_last_3d.
        device: device type, "cpu" or "cuda".
        bias: whether the forward pass adds one value per output channel.
        activation: "none", "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh" (its tanh approximation); any but
            "none" only in front of a pool.
        negative_slope: of leaky_relu, not negative.
        pool: the max-pool after the activation, or None.

    Raises:
        ValueError: a size is impossible; the message names it, what was given and what is expected.

    Example:
        >>> problem = ConvProblem(8, 16, 24, (15, 15, 30), (3, 3, 3), padding=((1, 1),) * 3)
        >>> str(problem)
        'cpu-float32-ncdhw-n8ic16oc24-i15x15x30-k3-p1'
        >>> ConvProblem.parse(str(problem)) == problem
        True
        >>> problem.output_size, problem.reduction_length("forward")
        ((15, 15, 30), 432)
    """

    batch: int
    in_channels: int
    out_channels: int
    input_size: Size3
    kernel_size: Size3
    stride: Size3 = (1, 1, 1)
    padding: Padding3 = ((0, 0), (0, 0), (0, 0))
    dilation: Size3 = (1, 1, 1)
    groups: int = 1
    dtype: str = "float32"
    layout: Layout = "ncdhw"
    device: str = "cpu"
    bias: bool = False
    activation: Activation = "none"
    negative_slope: float = NEGATIVE_SLOPE
    pool: MaxPool | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups={self.groups} must be positive and divide in_channels={self.in_channels} "
                f"and out_channels={self.out_channels}"
            )
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 on every axis")
        if min(self.batch, self.in_channels, self.out_channels, *self.input_size) < 0:
            raise ValueError(f"negative size in {self}")
        if min(min(pair) for pair in self.padding) < 0:
            raise ValueError(f"padding={self.padding} must not be negative")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {LAYOUTS}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {tuple(DTYPE_BYTES)}")
        if min(self.output_size) < 1:
            raise ValueError(
                f"kernel_size={self.kernel_size} with dilation={self.dilation} is larger than "
                f"input_size={self.input_size} with padding={self.padding}"
            )
        self._check_epilogue()

    def _check_epilogue(self) -> None:
        check_activation(self.activation, self.negative_slope)
        if self.activation != "none" and self.pool is None:
            raise ValueError(f"activation={self.activation!r} is fused in front of a pool only; pool is None")
        if self.negative_slope != NEGATIVE_SLOPE and self.activation != "leaky_relu":
            raise ValueError(f"negative_slope={self.negative_slope} is of leaky_relu; activation={self.activation!r}")
        if self.pool is not None and min(self.pooled_size) < 1:
            raise ValueError(f"pool window={self.pool.window} is larger than the convolution's {self.output_size}")

    def __hash__(self) -> int:
        # Asked for several times in every call.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def __reduce__(self) -> tuple[object, ...]:
        # What is cached stays behind: the hash of a string is another one in another process.
        return type(self), self._values()

    @cached_property
    def output_size(self) -> Size3:
        """(depth, height, width) of the output, in voxels."""
        depth, height, width = (
            (size + begin + end - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, (begin, end), dilation in zip(
                self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return depth, height, width

    @cached_property
    def pooled_size(self) -> Size3:
        """(depth, height, width) after the pool, in voxels; `output_size` without a pool."""
        return self.output_size if self.pool is None else self.pool.output_size(self.output_size)

    @cached_property
    def input_shape(self) -> tuple[int, int, int, int, int]:
        """(N, C_in, D, H, W), the torch shape of the input in either layout."""
        return (self.batch, self.in_channels, *self.input_size)

    @cached_property
    def output_shape(self) -> tuple[int, int, int, int, int]:
        """(N, C_out, D_out, H_out, W_out), the torch shape of the output in either layout."""
        return (self.batch, self.out_channels, *self.output_size)

    @cached_property
    def pooled_shape(self) -> tuple[int, int, int, int, int]:
        """(N, C_out, D_pooled, H_pooled, W_pooled), the torch shape of the result in either layout."""
        return (self.batch, self.out_channels, *self.pooled_size)

    @cached_property
    def weight_shape(self) -> tuple[int, int, int, int, int]:
        """(C_out, C_in / groups, K_d, K_h, K_w), the torch shape of the weight in either layout."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def flops(self, pass_: Pass) -> int:
        """Floating-point operations of direct convolution, an FMA counted as two, padding counted as work.

        The three passes do the same multiplications in another order, so the number is the same for each;
        adding the bias is one more per output value of the forward pass. With a pool the gradients need only
        the chosen voxels, and that of the bias, one addition for each, comes with that of the weight.
        Comparisons and activations are not counted.
        """
        summed = self.output_shape if pass_ == "forward" else self.pooled_shape
        multiply_adds = math.prod(summed) * math.prod(self.weight_shape[1:])
        return 2 * multiply_adds + (math.prod(summed) if self._has_bias(pass_) else 0)

    def min_bytes(self, pass_: Pass) -> int:
        """Bytes that a pass must move at the least: each operand read once, the result written once.

        With a pool each pooled value has a byte beside it, the index of the chosen voxel.
        """
        values = math.prod(self.input_shape) + math.prod(self.pooled_shape) + math.prod(self.weight_shape)
        if self._has_bias(pass_):
            values += self.out_channels
        return values * DTYPE_BYTES[self.dtype] + (math.prod(self.pooled_shape) if self.pool else 0)

    def _has_bias(self, pass_: Pass) -> bool:
        return self.bias and (pass_ == "forward" or (pass_ == "grad_weight" and self.pool is not None))

    def reduction_length(self, pass_: Pass) -> int:
        """The largest number of products summed into one value of the result; scales rounding error."""
        if pass_ == "forward":
            return self.in_channels // self.groups * math.prod(self.kernel_size)
        if pass_ == "grad_input":
            # Only taps k with (voxel + padding - k * dilation) divisible by the stride reach an input voxel.
            taps = (
                -(-kernel * math.gcd(stride, dilation) // stride)
                for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True)
            )
            overlap = 1 if self.pool is None else self.pool.overlap
            return self.out_channels // self.groups * math.prod(taps) * overlap
        return self.batch * math.prod(self.pooled_size)

    def with_(self, **changes: object) -> ConvProblem:
        """A copy with some fields changed.

        Example:
            >>> ConvProblem(1, 4, 4, (8, 8, 8), (3, 3, 3)).with_(layout="ndhwc").layout
            'ndhwc'
        """
        return replace(self, **changes)  # type: ignore[arg-type]

    def without_epilogue(self) -> ConvProblem:
        """The convolution alone, its bias included."""
        return replace(self, activation="none", negative_slope=NEGATIVE_SLOPE, pool=None)

    def __str__(self) -> str:
        return _format(self)

    @classmethod
    def parse(cls, text: str) -> ConvProblem:
        """The problem that `str(problem)` wrote.

        Raises:
            ValueError: the text is not of that form.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a convolution problem; expected a form like "
                "'cpu-float32-ncdhw-n8ic16oc24-i15x15x30-k3-p1'"
            )
        field = match.groupdict()
        return cls(
            batch=int(field["batch"]),
            in_channels=int(field["in_channels"]),
            out_channels=int(field["out_channels"]),
            input_size=parse_size(field["input_size"]),
            kernel_size=parse_size(field["kernel_size"]),
            stride=parse_size(field["stride"] or "1"),
            padding=_parse_padding(field["padding"] or "0"),
            dilation=parse_size(field["dilation"] or "1"),
            groups=int(field["groups"] or 1),
            dtype=field["dtype"],
            layout=field["layout"],  # type: ignore[arg-type]
            device=field["device"],
            bias=field["bias"] is not None,
            activation=field["activation"] or "none",  # type: ignore[arg-type]
            negative_slope=float(field["negative_slope"] or NEGATIVE_SLOPE),
            pool=None if field["pool"] is None else MaxPool.parse(field["pool"]),
        )


@lru_cache(maxsize=4096)
def _format(problem: ConvProblem) -> str:
    groups = f"g{problem.groups}" if problem.groups != 1 else ""
    parts = [
        problem.device,
        problem.dtype,
        problem.layout,
        f"n{problem.batch}{groups}ic{problem.in_channels}oc{problem.out_channels}",
        "i" + "x".join(map(str, problem.input_size)),
        "k" + format_axes(problem.kernel_size),
    ]
    if problem.stride != (1, 1, 1):
        parts.append("s" + format_axes(problem.stride))
    if problem.padding != ((0, 0),) * 3:
        depth, height, width = (f"{begin}" if begin == end else f"{begin}+{end}" for begin, end in problem.padding)
        parts.append("p" + format_axes((depth, height, width)))
    if problem.dilation != (1, 1, 1):
        parts.append("d" + format_axes(problem.dilation))
    if problem.bias:
        parts.append("bias")
    if problem.activation != "none":
        slope = f"({problem.negative_slope!r})" if problem.negative_slope != NEGATIVE_SLOPE else ""
        parts.append(problem.activation + slope)
    if problem.pool is not None:
        parts.append(f"pool{problem.pool}")
    return "-".join(parts)


def _parse_padding(text: str) -> Padding3:
    def pair(axis: str) -> tuple[int, int]:
        begin, _, end = axis.partition("+")
        return int(begin), int(end or begin)

    depth, height, width = (pair(axis) for axis in split_axes(text))
    return depth, height, width
