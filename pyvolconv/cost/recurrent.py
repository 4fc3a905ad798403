"""Recurrent layers: formulas for oneDNN's and cuDNN's operators.

torch.utils.flop_counter says 0 for an LSTM on CPU, hence these. Per frame, sample and direction, with input size I,
hidden size H and G gates (LSTM 4, GRU 3, plain RNN 1):

    forward      2 G H (I + H) products + 2 G H biases + 9 H cell (5 activations, c = f c + i g, h = o tanh c)
    grad_input   2 G H (I + H) products, without I where the input needs no gradient + 23 H cell (chain rule)
    grad_weight  2 G H (I + H) products + G H bias sums

For a GRU or a plain RNN, 9 H and 23 H scale with G / 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .work import Formula, IsWeight, OperatorCost, Work, tensor_bytes

_RNN_KINDS = {0: ("rnn", 1), 1: ("rnn", 1), 2: ("lstm", 4), 3: ("gru", 3)}  # torch's mode number: kind, gates
_CELL_FORWARD, _CELL_BACKWARD = 9, 23


def _recurrent(frames: int, inputs: int, hidden: int, gates: int, passes: tuple[bool, bool, bool]) -> tuple[int, ...]:
    """FLOPs of one layer and direction over `frames` frames of all samples.

    Args:
        passes: whether biases are added, whether the input needs its gradient, whether this is backward.

    Returns:
        (forward,) or (grad_input, grad_weight).
    """
    has_bias, needs_input, backward = passes
    product = 2 * gates * hidden
    if not backward:
        cell = _CELL_FORWARD * hidden * gates // 4
        return (frames * (product * (inputs + hidden) + (product if has_bias else 0) + cell),)
    cell = _CELL_BACKWARD * hidden * gates // 4
    grad_input = frames * (product * ((inputs if needs_input else 0) + hidden) + cell)
    grad_weight = frames * (product * (inputs + hidden) + (gates * hidden if has_bias else 0))
    return grad_input, grad_weight


def _mkldnn_rnn(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    x, weight_input, weight_hidden, bias_input, bias_hidden, hx, cx = args[:7]
    kind, gates = _RNN_KINDS[args[9]]
    hidden, frames = args[10], x.shape[0] * x.shape[1]
    inputs = x.shape[2]
    (flops,) = _recurrent(frames, inputs, hidden, gates, (args[12], False, False))
    # The fourth result is oneDNN's workspace for backward.
    size = tensor_bytes(x, weight_input, weight_hidden, bias_input, bias_hidden, hx, cx, list(result[:3]))
    multiply_adds = frames * gates * hidden * (inputs + hidden)
    return OperatorCost(kind, (Work("forward", flops, size, None, (weight_input, weight_hidden), multiply_adds),))


def _mkldnn_rnn_backward(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    x, weight_input, weight_hidden = args[:3]
    hx, cx, output, _, _, grad_output = args[5:11]
    kind, gates = _RNN_KINDS[args[14]]
    hidden, has_bias = args[15], args[17]
    flops = _recurrent(x.shape[0] * x.shape[1], x.shape[2], hidden, gates, (has_bias, x.requires_grad, True))
    grad_x, grad_weight_input, grad_weight_hidden = result[:3]
    needed = [grad_x] if x.requires_grad else []
    sizes = (
        tensor_bytes(weight_input, weight_hidden, output, grad_output, hx, cx, needed),
        tensor_bytes(x, output, grad_weight_input, grad_weight_hidden, list(result[3:5])),
    )
    return OperatorCost(
        kind,
        (
            Work("grad_input", flops[0], sizes[0], None, (weight_input, weight_hidden)),
            Work("grad_weight", flops[1], sizes[1]),
        ),
    )


def _cudnn_rnn(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    x, weights = args[0], args[1]
    kind, layers = _cudnn_layers(x, args[6:10], args[13])
    multiply_adds = _frames(x) * sum(gates * hidden * (inputs + hidden) for inputs, hidden, gates in layers)
    bias = len(weights) == 4 * len(layers)
    flops = sum(_recurrent(_frames(x), *layer, (bias, False, False))[0] for layer in layers)
    # The last two results are cuDNN's workspace and its copy of the weights.
    work = Work(
        "forward",
        flops,
        tensor_bytes(x, list(weights), list(result[:3])),
        None,
        tuple(w for w in weights if w.dim() == 2),
        multiply_adds,
    )
    return OperatorCost(kind, (work,))


def _cudnn_rnn_backward(args: Sequence[Any], result: Any, is_weight: IsWeight) -> OperatorCost:
    x, weights, output, grad_output = args[0], args[1], args[6], args[7]
    kind, layers = _cudnn_layers(x, args[10:14], args[17])
    bias = len(weights) == 4 * len(layers)
    directions = 2 if args[17] else 1
    flops = [
        _recurrent(_frames(x), *layer, (bias, index >= directions or x.requires_grad, True))
        for index, layer in enumerate(layers)
    ]
    sizes = tensor_bytes(list(weights), output, grad_output, result[0]), tensor_bytes(x, output, list(result[3]))
    works = (
        Work("grad_input", sum(grad_input for grad_input, _ in flops), sizes[0]),
        Work("grad_weight", sum(grad_weight for _, grad_weight in flops), sizes[1]),
    )
    return OperatorCost(kind, works)


def _cudnn_layers(x: Tensor, shape: Sequence[int], bidirectional: bool) -> tuple[str, list[tuple[int, int, int]]]:
    """Kind, and for each layer and direction (input size, hidden size, gates).

    `shape` is mode, hidden size, projected size and layers. The projection itself is not counted.
    """
    mode, hidden, projected, layers = shape
    kind, gates = _RNN_KINDS[mode]
    directions = 2 if bidirectional else 1
    later = (projected or hidden) * directions
    return kind, [
        (later if layer else x.shape[-1], hidden, gates) for layer in range(layers) for _ in range(directions)
    ]


def _frames(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


RECURRENT_FORMULAS: dict[str, Formula] = {
    "aten::mkldnn_rnn_layer": _mkldnn_rnn,
    "aten::mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
    "aten::_cudnn_rnn": _cudnn_rnn,
    "aten::_cudnn_rnn_backward": _cudnn_rnn_backward,
}
"""By "namespace::name"."""
