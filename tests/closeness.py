"""Results of one sum that was computed in two orders: equal but for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def assert_close(got: Any, expected: Any, *, equal_nan: bool = False) -> None:
    """Equal but for rounding, in units in the last place of the largest value, or of one if all are smaller.

    That is far less than any fault would change.

    Tensors, or tuples, lists and mappings of them. Not in units of each value, as `torch.testing.assert_close` counts
    by default: where the products of a sum cancel, the rounding of the sum is large beside what remains, in torch's
    own kernels too (of float32 sums of 108 products, one draw of 5,000 is beyond that tolerance).
    """
    if isinstance(expected, Mapping):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(got[key], value, equal_nan=equal_nan)
    elif isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, equal_nan=equal_nan)
    else:
        torch.testing.assert_close(got, expected, **_tolerance(expected), equal_nan=equal_nan)


def _tolerance(expected: Any) -> dict[str, float]:
    if not isinstance(expected, Tensor) or not (expected.is_floating_point() or expected.is_complex()):
        return {}
    eps = torch.finfo(expected.dtype).eps
    # Sums in float16 and bfloat16 are rounded once, at their end; others wherever a kernel cuts them in parts. In
    # float64 there is room for what several layers make of that, too.
    units = 2 if eps > 1e-4 else 2**8 if eps > 1e-10 else 2**20
    sizes = expected.detach().abs()
    finite = sizes[sizes.isfinite()]
    size = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return {"rtol": 0.0, "atol": units * eps * size}
