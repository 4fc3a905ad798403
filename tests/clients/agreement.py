"""What float32 may do to a network's results, measured on torch itself.

A network has no useful bound in advance: how far rounding goes depends on its depth, norms and weights, and a bias in
front of a norm has no gradient but rounding. So torch is the measure. The same network runs in float64, which is exact
for this purpose, and in float32 by torch in two ways, with oneDNN and without, which sum in different orders. Then for
each tensor, as a vector,

    |ours - exact| <= MULTIPLE * max(|torch - exact|) + FLOOR * eps * |exact|

MULTIPLE is for what one sample of a random error tells about another and for Winograd kernels, which round a few times
as much as direct ones; FLOOR for tensors in which torch happened to be nearly exact. One number tells nothing about the
spread of its errors, so gradients of few numbers (biases, slopes of PReLU) are taken together as one vector. A wrong
tap or a missing gradient is thousands of times as much: `test_agreement` plants one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kinks import Distances, decided_by_rounding
from .networks import Network

MULTIPLE = 8.0
FLOOR = 64.0
FEW = 16
EPSILON = torch.finfo(torch.float32).eps

Results = dict[str, Tensor]


def run(network: Network, model: nn.Module, dtype: torch.dtype, projection: Tensor | None) -> Results:
    """The output and, of its product with `projection`, the gradients of inputs and parameters; `model` has no others.

    Without a projection only the output, in inference.
    """
    inputs = [x.detach().to(dtype).requires_grad_(projection is not None) for x in network.inputs]
    if projection is None:
        with torch.no_grad():
            return {"output": network(model.eval(), inputs).double()}
    output = network(model.train(), inputs)
    (output * projection.to(dtype)).sum().backward()
    results = {"output": output.detach()} | {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    few = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.numel() < FEW:
            few.append(parameter.grad.flatten())
        elif parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad
    if few:
        results[f"gradients of parameters of less than {FEW} numbers"] = torch.cat(few)
    return {name: tensor.double() for name, tensor in results.items()}


@dataclass(frozen=True)
class Measure:
    """A network, its exact results and those of torch in float32."""

    network: Network
    projection: Tensor | None
    exact: Results
    rounded: list[Results]

    def by(self, model: nn.Module) -> Results:
        return run(self.network, model, torch.float32, self.projection)

    def excess(self, results: Results) -> dict[str, float]:
        """The error of each tensor as a multiple of what is allowed."""
        assert results.keys() == self.exact.keys()
        found = {}
        for name, true in self.exact.items():
            own = max(float((others[name] - true).norm()) for others in self.rounded)
            allowed = MULTIPLE * own + FLOOR * EPSILON * float(true.norm())
            error = float((results[name] - true).norm())
            found[name] = error / allowed if error else 0.0
        return found

    def assert_agrees(self, results: Results, who: str) -> None:
        excess = self.excess(results)
        wrong = {name: f"{value:.3g}" for name, value in excess.items() if not value <= 1}
        assert not wrong, f"{who}: errors as multiples of what torch's own float32 allows: {wrong}"


def measure(build: Callable[[], Network], gradients: bool) -> Measure:
    """A network and inputs for which float32 makes sense, with the results of torch.

    Raises:
        RuntimeError: in each of fifty draws a value lies where rounding decides about the gradient.
    """
    for _ in range(50):
        network = build()
        exactly, roughly = Distances(), Distances()
        with torch.no_grad():
            output = network(copy.deepcopy(network.model), network.inputs)
        projection = torch.randn_like(output, dtype=torch.float64) if gradients else None
        with exactly:
            exact = run(network, copy.deepcopy(network.model).double(), torch.float64, projection)
        with roughly:
            rounded = run(network, copy.deepcopy(network.model), torch.float32, projection)
        if gradients and decided_by_rounding(exactly, roughly):
            continue
        with torch.backends.mkldnn.flags(enabled=False):
            another = run(network, copy.deepcopy(network.model), torch.float32, projection)
        return Measure(network, projection, exact, [rounded, another])
    raise RuntimeError("each of fifty draws has a value where rounding decides about the gradient")
