"""What a backend is: one hand-written path that can run the three passes of a convolution.

Contract, relied on by every backend and kept by `pyvolconv.ops`:

- activations and weights arrive dense in `problem.layout`: contiguous for "ncdhw", channels_last_3d for
  "ndhwc" (a weight is then stored as (C_out, K_d, K_h, K_w, C_in / groups)); bias is a dense vector;
- dtype and device of every tensor are the problem's; no size is zero; nothing requires grad;
- a pass returns a new dense tensor in `problem.layout` and never writes to an argument;
- `forward` adds `bias` exactly when `problem.bias` is set;
- `forward_epilogue` is `forward`, then a residual is added, then an activation applied: it may round once, or after
  each of the three. The residual lies dense like the result; dtypes are floating-point.

A problem with a pool asks for the fused passes (`forward_max_pool` and its gradients), which a backend may have:

- forward computes max_pool3d(activation(conv3d(x, weight) + bias)) without storing what is pooled, and chooses a voxel
  of each window as torch's max_pool3d does: the first maximum in the order d, h, w; a NaN wins, the last one stays;
- for each pooled value it returns a byte, the chosen voxel's index (d * window_h + h) * window_w + w in its window, or
  `epilogue.NO_VOXEL` where the activation is relu and the pooled value is zero: no gradient passes through it;
- where the activation's derivative does not follow from its value (`epilogue.KEEPS_PREACTIVATION`) the first result is
  the value before the activation at the voxel that was chosen after it;
- gradients take `grad`, that of the pre-activation at the chosen voxels, of the shape and layout of `code`; what stands
  at NO_VOXEL counts as zero, whatever it is, and where windows overlap, a voxel chosen twice counts twice;
- the gradient of the bias, the sum of all of `grad` that counts, comes with that of the weight when `problem.bias` is
  set.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import Activation
from ..problem import ConvProblem, Pass, Size3

Shape = tuple[int, int, int, int, int]

Self = TypeVar("Self", bound="Backend")

MEMORY_FORMAT = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}

_ACTIVATE_IN_PLACE: dict[Activation, Callable[[Tensor, float], Tensor]] = {
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y, inplace=True),
    "leaky_relu": lambda y, slope: F.leaky_relu(y, slope, inplace=True),
    "silu": lambda y, slope: F.silu(y, inplace=True),
    "gelu": lambda y, slope: torch.ops.aten.gelu_.default(y),
    "gelu_tanh": lambda y, slope: torch.ops.aten.gelu_.default(y, approximate="tanh"),
}


@dataclass(frozen=True)
class Accuracy:
    """How far a backend's results may be from exact ones.

    With u the unit roundoff step `torch.finfo(dtype).eps` of the dtype in which sums are kept, K the
    problem's `reduction_length` and conv(|x|, |w|) the same pass over absolute values:

        |got - exact| <= constant * u * K * conv(|x|, |w|) + eps(result dtype) * |exact|

    to within the distance of numbers below the result dtype's smallest normal one (of `cpp.bfloat16`, which takes such
    operands for zero, times the other operand). `cpp.amx` takes parts of operands, sums and results below 2**-126 for
    zero: an operand may count for that much less of itself, and each of up to 18 additions for a product may lose as
    much. An algorithm that mixes neighbouring voxels (Winograd) has a `reach`: the product of absolute values is then
    the largest within that many voxels of the result, of the convolution continued beyond the ends of the result.

    Operands are finite there. Whether an infinite or NaN weight (of grad_weight: gradient) makes a result NaN whose
    window reaches into the padding depends on the kernel, in torch too: most multiply it by the zeros that stand for
    padding, some, `numba` always, leave those products out. In grad_weight of ncdhw the compiled kernels fill up rows
    with zeros, so that an infinite input may make those results NaN that have to be infinite; none comes out finite.
    `triton.tma` makes NaN of more: its steps run over the ends of summed axes, where zeros stand on one side only. In
    forward, unless a step of channels divides their number, an infinite weight may make results NaN that have to be
    infinite; in grad_weight an infinite or NaN input may make the gradients of other taps of its channel NaN.

    Attributes:
        constant: c above. 1 covers any order of a plain sum.
        accumulate_dtype: name of the dtype whose eps is u.
        bitwise_reproducible: the same bits at every run and at every thread count.
        reach: voxels per axis, 0 where each result is a sum of its own products.
        exact_integers: integers whose sums the dtype holds exactly give exact results.
    """

    constant: float
    accumulate_dtype: str
    bitwise_reproducible: bool
    reach: tuple[int, int, int] = (0, 0, 0)
    exact_integers: bool = True


class Backend(ABC):
    """One way to compute `forward`, `grad_input` and `grad_weight`.

    Class attributes:
        name: unique, what `use_backend` and reports say, e.g. "cpp.direct".
        family: the part of the name before the dot; `use_backend` accepts it too.
        automatic: whether the dispatcher may choose it without being told to.
        ours: False for the peer (torch itself), which is never counted as a path of this package.
        mixes_layouts: which operands of `forward` of a problem in ndhwc, "x" or "weight", may be contiguous, too.

    Attributes:
        configuration: how the kernels are launched, one of `configurations`; empty where the backend decides itself.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    automatic: ClassVar[bool] = True
    ours: ClassVar[bool] = True
    mixes_layouts: ClassVar[tuple[str, ...]] = ()
    configuration: str = ""

    @abstractmethod
    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        """Why this backend cannot run a pass of a problem here and now; empty when it can."""

    @abstractmethod
    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y of shape `problem.output_shape`."""

    @abstractmethod
    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        """dL/dx of shape `problem.input_shape`."""

    @abstractmethod
    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        """dL/dw of shape `problem.weight_shape`."""

    def transposed(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """conv_transpose3d: `grad_input` of `problem`, whose input is the result, plus a bias of its channels.

        The bias is added to the gradient as it is rounded: whether it was here or afterwards changes no bit.
        """
        y = self.grad_input(problem, x, weight)
        return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))

    def forward_epilogue(
        self,
        problem: ConvProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: Activation,
        negative_slope: float,
    ) -> Tensor:
        """activation(y + residual), of shape `problem.output_shape`; `problem` is that of `forward`."""
        y = self.forward(problem, x, weight, bias)
        return activate_in_place(y if residual is None else y.add_(residual), activation, negative_slope)

    def __repr__(self) -> str:
        return f"<backend {self.label}>"

    @property
    def label(self) -> str:
        """What times are kept under and messages say: "name", or "name@configuration"."""
        return f"{self.name}@{self.configuration}" if self.configuration else self.name

    def configurations(self, problem: ConvProblem, pass_: Pass) -> tuple[str, ...]:
        """Other launches of the same kernels that are worth timing for a pass, the most promising first.

        Each is a short text without spaces. Results keep the bound of `accuracy` in all of them.
        """
        return ()

    def configured(self: Self, configuration: str) -> Self:
        """This backend with its kernels launched in one of the ways of `configurations`."""
        other = copy.copy(self)
        other.configuration = configuration
        return other

    def prepare(self, problem: ConvProblem, pass_: Pass) -> None:  # noqa: B027 (most have nothing to do)
        """Compile what the first call of a pass would have to, without computing anything or taking memory for it.

        Several threads may call it at the same time. What cannot be compiled raises an exception.
        """

    @property
    def has_max_pool(self) -> bool:
        """Whether there are fused passes to ask `unsupported_reasons` about, with a problem that has a pool."""
        return type(self).forward_max_pool is not Backend.forward_max_pool

    def forward_max_pool(
        self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pooled values and uint8 codes, both of shape `problem.pooled_shape`."""
        raise NotImplementedError(f"{self.name} has no fused passes: {problem}")

    def max_pool(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The pooled values of `forward_max_pool` alone, for what has no backward: they may round otherwise."""
        return self.forward_max_pool(problem, x, weight, bias)[0]

    def grad_input_max_pool(self, problem: ConvProblem, grad: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        """dL/dx of shape `problem.input_shape`."""
        raise NotImplementedError(f"{self.name} has no fused passes: {problem}")

    def grad_weight_max_pool(
        self, problem: ConvProblem, grad: Tensor, code: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """dL/dw of shape `problem.weight_shape`, and dL/dbias (C_out,) when `problem.bias` is set, else None."""
        raise NotImplementedError(f"{self.name} has no fused passes: {problem}")

    @abstractmethod
    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """The error bound that results keep."""

    @abstractmethod
    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Expected share of the machine's FMA peak; the dispatcher's cost model compares these.

        The FLOPs are those of direct convolution, so an algorithm with fewer may exceed 1.
        """


def activate_in_place(y: Tensor, activation: Activation, negative_slope: float) -> Tensor:
    """The activation of a result that nobody else has, in its place."""
    return _ACTIVATE_IN_PLACE[activation](y, negative_slope)


_SHAPES = {
    "input": "input_shape",
    "output": "output_shape",
    "weight": "weight_shape",
    "pooled": "pooled_shape",
    "code": "pooled_shape",
}


def empty(problem: ConvProblem, what: Literal["input", "output", "weight", "pooled", "code"], like: Tensor) -> Tensor:
    """An uninitialised dense tensor in `problem.layout`, on the device of `like`; of its dtype, a code of uint8."""
    shape = getattr(problem, _SHAPES[what])
    dtype = torch.uint8 if what == "code" else like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=MEMORY_FORMAT[problem.layout])


def operand_shapes(problem: ConvProblem, pass_: Pass) -> tuple[Shape, Shape]:
    """Shapes of the two tensors that a plain pass takes, in the order of its arguments.

    Example:
        >>> operand_shapes(ConvProblem(2, 3, 4, (8, 8, 8), (3, 3, 3)), "grad_weight")
        ((2, 4, 6, 6, 6), (2, 3, 8, 8, 8))
    """
    return {
        "forward": (problem.input_shape, problem.weight_shape),
        "grad_input": (problem.output_shape, problem.weight_shape),
        "grad_weight": (problem.output_shape, problem.input_shape),
    }[pass_]


def geometry(problem: ConvProblem) -> tuple[Size3, Size3, Size3, int]:
    """Stride, zeros before each axis, dilation and groups, as the functions in `pyvolconv.kernels` take them."""
    (depth, _), (height, _), (width, _) = problem.padding
    return problem.stride, (depth, height, width), problem.dilation, problem.groups
