"""What the report says of the data and of the two networks before anything is timed: words, sizes, counted work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost.counting import count_model
from ..cost.results import NetworkFacts
from ..problem import PASSES, ConvProblem
from .data import Splits
from .models import NetworkName, build, parameter_count
from .paths import Need

CNN_WORDS = (
    "Conv3d 1-16-24-32 (3×3×3, stride 1, padding 1), each with ReLU and 2×2×2 max-pool; dense 16, dense {classes}"
)
LSTM_WORDS = "{frames} frames of {values} values: LSTM {values}-16-16{directions}, dense {classes}{variant}"
DIGITS_WORDS = (
    "Scanned handwritten digits that move round a field, clockwise or counter-clockwise, in noise. How hard that is "
    "was set on purpose, so that both networks come near 100%: in the full run with batches of 32 the CNN "
    "in about 10 epochs, the LSTM in 50 to 70. No digit of a test video was seen in training."
)


def describe(
    name: NetworkName, data: Splits, batch: tuple[Tensor, Tensor], seed: int
) -> tuple[NetworkFacts, list[Need]]:
    """Facts of one network, and the convolution passes that a training step of it on `batch` runs.

    It is counted on the CPU, wherever the batch is: the work is the same, and torch has no fake backward pass of
    cuDNN's LSTM.
    """
    device = batch[0].device.type
    x, y = (part.cpu() for part in batch)
    model = build(name, data.input_size, data.classes, seed)
    costs = count_model(model, x, lambda logits: torch.nn.functional.cross_entropy(logits, y))
    weights = sum(cost.weights for cost in costs)
    facts = NetworkFacts(
        name="cnn" if name == "cnn" else "lstm",
        description=_words(name, data),
        parameters=parameter_count(model),
        flops=sum(cost.flops for cost in costs) / len(x),
        weight_uses=sum(cost.weights * cost.weight_uses for cost in costs) / weights,
    )
    needs: list[Need] = []
    for cost in costs:
        if cost.problem is not None:
            problem = ConvProblem.parse(cost.problem).with_(batch=len(x), device=device)
            needs += [(problem, pass_) for pass_ in PASSES if pass_ in cost.passes]
    return facts, needs


def _words(name: NetworkName, data: Splits) -> str:
    frames, height, width = data.input_size
    bidirectional = parameter_count(build("bilstm", data.input_size, data.classes))
    return (CNN_WORDS if name == "cnn" else LSTM_WORDS).format(
        classes=data.classes,
        frames=frames,
        values=height * width,
        directions=" in both directions" if name == "bilstm" else "",
        variant="" if name == "bilstm" else f" (its bidirectional variant has {bidirectional:,} parameters)",
    )
