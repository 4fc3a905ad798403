"""Work of one operator call: floating-point operations and least bytes, from its arguments and result.

Conventions. An FMA is two operations; a comparison, an exponential, a root or a division is one. Bytes are the least
that a call moves: every operand read once, every result written once; a view moves none. What has more to
it than that stands in `formulas` (convolutions, products, pooling) and `recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .formulas import FORMULAS
from .work import IsWeight, OperatorCost, Work, tensor_bytes, tensors_in

# Operations per value of the result.
_ELEMENTWISE = {
    "activation": {
        "relu": 1, "relu_": 1, "threshold_backward": 1, "leaky_relu": 2, "leaky_relu_backward": 2, "elu": 3,
        "elu_backward": 3, "gelu": 8, "gelu_backward": 16, "silu": 4, "silu_": 4, "silu_backward": 7, "sigmoid": 3,
        "sigmoid_": 3, "sigmoid_backward": 3, "tanh": 1, "tanh_": 1, "tanh_backward": 3, "hardtanh": 2,
        "hardtanh_backward": 2, "softplus": 3, "softplus_backward": 4, "_softmax": 4, "_softmax_backward_data": 4,
    },
    "norm": {
        # Mean 1, variance 3, scale and shift 2; backward: two sums 1 + 3, gradient 5.
        "native_batch_norm": 6, "_native_batch_norm_legit": 6, "_batch_norm_with_update": 6,
        "native_batch_norm_backward": 9, "batch_norm_backward": 9, "native_group_norm": 6,
        "native_group_norm_backward": 9, "native_layer_norm": 6, "native_layer_norm_backward": 9,
        "cudnn_batch_norm": 6, "cudnn_batch_norm_backward": 9,
    },
    "dropout": {"native_dropout": 2, "native_dropout_backward": 1, "bernoulli_": 1, "bernoulli": 1},
    "loss": {
        "_log_softmax": 5, "_log_softmax_backward_data": 4, "nll_loss_forward": 1, "nll_loss_backward": 1,
        "mse_loss": 3, "mse_loss_backward": 3, "binary_cross_entropy_with_logits": 6, "l1_loss": 3,
    },
    "elementwise": {
        "add": 1, "add_": 1, "sub": 1, "sub_": 1, "mul": 1, "mul_": 1, "div": 1, "div_": 1, "neg": 1, "abs": 1,
        "sqrt": 1, "sqrt_": 1, "rsqrt": 1, "exp": 1, "log": 1, "pow": 1, "lerp_": 3, "lerp": 3, "addcmul_": 3,
        "addcmul": 3, "addcdiv_": 3, "addcdiv": 3, "maximum": 1, "minimum": 1, "clamp": 2, "where": 1, "eq": 1,
        "ne": 1, "lt": 1, "gt": 1, "le": 1, "ge": 1, "rsub": 1,
    },
}  # fmt: skip
# Operations per value of the first operand.
_REDUCTIONS = {
    "elementwise": {
        "sum": 1,
        "mean": 1,
        "amax": 1,
        "amin": 1,
        "max": 1,
        "argmax": 1,
        "var": 4,
        "linalg_vector_norm": 2,
    },
    "pool": {"_adaptive_avg_pool2d": 1, "_adaptive_avg_pool3d": 1, "adaptive_max_pool3d": 1},
}
_MEMORY = {
    "copy_", "clone", "_to_copy", "cat", "stack", "zero_", "fill_", "zeros", "zeros_like", "ones", "ones_like", "full",
    "full_like", "new_zeros", "new_full", "constant_pad_nd", "index_select", "gather", "scatter_add_", "index_put_",
    "select_backward", "slice_backward", "repeat", "flip", "roll", "scalar_tensor", "_unsafe_index", "contiguous",
}  # fmt: skip
_NO_WORK = {
    "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "_local_scalar_dense", "_unsafe_view",
    "unsafe_split", "unsafe_chunk",
    "_record_function_enter_new", "_record_function_exit", "device", "set_data", "is_same_size", "lift_fresh",
}  # fmt: skip
_WRITES_ONLY = {"copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_"}
_READS_NOTHING = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_full"}
_PER_RESULT = {name: (kind, flops) for kind, table in _ELEMENTWISE.items() for name, flops in table.items()}
_PER_OPERAND = {name: (kind, flops) for kind, table in _REDUCTIONS.items() for name, flops in table.items()}


def operator_cost(
    operator: torch._ops.OpOverload,
    args: Sequence[Any],
    result: Any,
    is_weight: IsWeight = lambda tensor: False,
) -> OperatorCost:
    """Kind and work of one call of a dispatcher operator.

    Args:
        operator: e.g. `torch.ops.aten.relu.default`.
        args: its positional arguments (ATen passes all but keyword-only ones so).
        result: what it returned.
        is_weight: whether a tensor is (a view of) a parameter.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
        >>> operator_cost(torch.ops.aten.mm.default, (a, b), a @ b).works[0].flops
        48
    """
    name = operator.overloadpacket.__name__
    special = FORMULAS.get(f"{operator.namespace}::{name}")
    if special is not None:
        return special(args, result, is_weight)
    if name in _NO_WORK or _is_view(operator):
        return OperatorCost("view", (Work(None, 0, 0),))
    size = _traffic(operator, name, args, result)
    if name in _MEMORY:
        return OperatorCost("memory", (Work(None, 0, size),))
    if name in _PER_OPERAND:
        kind, flops = _PER_OPERAND[name]
        return OperatorCost(kind, (Work(None, flops * tensors_in(args)[0].numel(), size),))
    values = max((tensor.numel() for tensor in tensors_in(result) or tensors_in(args)), default=0)
    if name in _PER_RESULT:
        kind, flops = _PER_RESULT[name]
        return OperatorCost(kind, (Work(None, flops * values, size),))
    return OperatorCost("other", (Work(None, values, size),), exact=False)


def _is_view(operator: torch._ops.OpOverload) -> bool:
    aliases = [result.alias_info for result in operator._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _traffic(operator: torch._ops.OpOverload, name: str, args: Sequence[Any], result: Any) -> int:
    read = 0 if name in _READS_NOTHING else tensor_bytes(list(args))
    returns = operator._schema.returns
    values = result if len(returns) > 1 else [result]
    fresh = [value for returned, value in zip(returns, values, strict=False) if returned.alias_info is None]
    written = [
        value
        for argument, value in zip(operator._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if name in _WRITES_ONLY:
        read -= tensor_bytes(written)
    return read + tensor_bytes(fresh, written)
