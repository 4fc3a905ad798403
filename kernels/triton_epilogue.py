"""What follows a convolution while its results are in registers: y = activation(conv + bias + residual)."""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Epilogue(NamedTuple):
    """An epilogue behind the bias.

    Attributes:
        activation: one of `pyvolconv.epilogue.ACTIVATIONS`.
        negative_slope: of leaky_relu.
        residual: what is added before the activation, of the result's shape, dtype and strides; or None.
    """

    activation: str = "none"
    negative_slope: float = 0.0
    residual: Tensor | None = None

    def arguments(self, result: Tensor) -> dict[str, Any]:
        """Those that a kernel with an epilogue takes."""
        return {
            "residual_ptr": result if self.residual is None else self.residual,
            "negative_slope": self.negative_slope,
            "HAS_RESIDUAL": self.residual is not None,
            "ACTIVATION": self.activation,
        }


NO_EPILOGUE = Epilogue()


@triton.jit
def activate(value, slope, ACTIVATION: tl.constexpr):
    """The activation of float32 values, NaN kept."""
    if ACTIVATION == "relu":
        value = tl.where(value <= 0, 0.0, value)
    elif ACTIVATION == "leaky_relu":
        value = tl.where(value > 0, value, value * slope)
    elif ACTIVATION == "silu":
        value = value / (1 + tl.exp(-value))
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 * u.
        value = value / (1 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    return value


@triton.jit
def apply_epilogue(total, residual_pointers, mask, slope, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """Float32 results, with the residual from where the result goes, through the activation."""
    if HAS_RESIDUAL:
        total += tl.load(residual_pointers, mask=mask, other=0.0).to(tl.float32)
    return activate(total, slope, ACTIVATION)
