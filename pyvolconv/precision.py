"""How much rounding error a faster algorithm may add: what `pyvolconv.set_precision` chose.

"default" allows algorithms whose error is of the order of a plain sum's: Winograd F(2x2x2), F(2x2x4) and
F(2x4x2), and products of three bfloat16 parts of each value on a matrix unit. "high" also allows F(2x4x4), F(4x4x4) and
products of two parts (an error of up to 2**-15 of each product), which are faster and round more: docs/performance.md
has the measured errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

Precision = Literal["default", "high"]
_precision: Precision = "default"
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # as torch.backends, at a tenth of the time


def get_precision() -> Precision:
    """What `set_precision` chose last; "default" at first.

    Example:
        >>> import pyvolconv
        >>> pyvolconv.get_precision()
        'default'
    """
    return _precision


def store_precision(precision: Precision) -> None:
    """Only for `pyvolconv.dispatch.set_precision`, which also forgets what was chosen before.

    Raises:
        ValueError: `precision` is neither "default" nor "high".
    """
    global _precision
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} is unknown; expected 'default' or 'high'")
    _precision = precision


def multiplies_float32_in_bfloat16() -> bool:
    """Whether the user lets torch's CPU matrix products of float32 compute in bfloat16; its convolutions then need not.

    That is `torch.set_float32_matmul_precision("medium")`, or `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`.

    Example:
        >>> multiplies_float32_in_bfloat16()
        False
    """
    return _fp32_precision("mkldnn", "matmul") == "bf16" if _fp32_precision is not None else False


def convolves_float32_in_bfloat16() -> bool:
    """Whether the user lets torch's CPU convolutions of float32 compute in bfloat16.

    That is `torch.backends.mkldnn.conv.fp32_precision = "bf16"`, or what torch takes it from where it is not set; never
    by default.

    Example:
        >>> convolves_float32_in_bfloat16()
        False
    """
    return _fp32_precision("mkldnn", "conv") == "bf16" if _fp32_precision is not None else False


def float32_arithmetic(device: str, operation: Literal["conv", "matmul"]) -> str:
    """In what the user lets torch compute float32: "ieee", "tf32" or "bf16", by `torch.backends` and its defaults.

    Example:
        >>> float32_arithmetic("cuda", "conv"), float32_arithmetic("cuda", "matmul")
        ('tf32', 'ieee')
    """
    if _fp32_precision is None:
        return "ieee"
    precision: str = _fp32_precision("cuda" if device == "cuda" else "mkldnn", operation)
    return precision if precision in ("tf32", "bf16") else "ieee"


def must_be_deterministic() -> bool:
    """Whether torch raises an error where the same bits are not certain: `torch.use_deterministic_algorithms(True)`.

    Example:
        >>> must_be_deterministic()
        False
    """
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def cuda_switches() -> tuple[object, ...]:
    """Those of torch's settings that decide which backends can run on CUDA, and how fast.

    Example:
        >>> cuda_switches()
        ('tf32', 'ieee', False, False)
    """
    return (
        float32_arithmetic("cuda", "conv"),
        float32_arithmetic("cuda", "matmul"),
        torch.backends.cuda.matmul.allow_fp16_accumulation,
        must_be_deterministic(),
    )


@contextmanager
def use_tf32(allowed: bool) -> Iterator[None]:
    """Let CUDA convolutions of float32, torch's own and ours, round their operands to TF32 inside the block, or not.

    The setting is the process's, as torch's is: backward passes that run in other threads meanwhile follow it too.

    Example:
        >>> with use_tf32(False):
        ...     float32_arithmetic("cuda", "conv")
        'ieee'
    """
    # By the newer of torch's two interfaces: the older covers recurrent layers too, and they do not mix.
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before
