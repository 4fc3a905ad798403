"""What a backend is: one hand-written path that can run the three passes of a convolution.

Contract, relied on by every backend and kept by `pyvolconv.ops`:

- activations and weights arrive dense in `problem.layout`: contiguous for "ncdhw", channels_last_3d for
  "ndhwc" (a weight is then stored as (C_out, K_d, K_h, K_w, C_in / groups)); bias is a dense vector;
- dtype and device of every tensor are the problem's; no size is zero; nothing requires grad;
- a pass returns a new dense tensor in `problem.layout` and never writes to an argument;
- `forward` adds `bias` exactly when `problem.bias` is set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..problem import ConvProblem, Pass

MEMORY_FORMAT = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}


@dataclass(frozen=True)
class Accuracy:
    """How far a backend's results may be from exact ones.

    With u the unit roundoff step `torch.finfo(dtype).eps` of the dtype in which sums are kept, K the
    problem's `reduction_length` and conv(|x|, |w|) the same pass over absolute values:

        |got - exact| <= constant * u * K * conv(|x|, |w|) + eps(result dtype) * |exact|

    Attributes:
        constant: c above. 1 covers any order of a plain sum.
        accumulate_dtype: name of the dtype whose eps is u.
        bitwise_reproducible: the same bits at every run and at every thread count.
    """

    constant: float
    accumulate_dtype: str
    bitwise_reproducible: bool


class Backend(ABC):
    """One way to compute `forward`, `grad_input` and `grad_weight`.

    Class attributes:
        name: unique, what `use_backend` and reports say, e.g. "cpp.direct".
        family: the part of the name before the dot; `use_backend` accepts it too.
        automatic: whether the dispatcher may choose it without being told to.
        ours: False for the peer (torch itself), which is never counted as a path of this package.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    automatic: ClassVar[bool] = True
    ours: ClassVar[bool] = True

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

    @abstractmethod
    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        """The error bound that results keep."""

    @abstractmethod
    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """Expected share of the machine's FMA peak, 0 to 1; the dispatcher's cost model compares these."""


def empty(problem: ConvProblem, what: Literal["input", "output", "weight"], like: Tensor) -> Tensor:
    """An uninitialised dense tensor in `problem.layout`, of the dtype and device of `like`."""
    shape = {"input": problem.input_shape, "output": problem.output_shape, "weight": problem.weight_shape}[what]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=MEMORY_FORMAT[problem.layout])
