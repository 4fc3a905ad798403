"""Every problem at which the blocking changes: exact on integers, within the bound, the same bits on all threads."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvolconv.epilogue import KEEPS_PREACTIVATION
from pyvolconv.fused_voxels import scatter, select

from .checks import activate, check_integers, pooled, random_code, random_grad, with_bias
from .kernels import CPP
from .problems import plain


def test_integers_are_exact(fused, cut_problem, operands, reference, poisoned):
    check_integers(fused, cut_problem, operands, reference)


def test_within_bound_and_same_bits_for_every_thread_count(
    fused, cut_problem, operands, reference, assert_within_bound, threads
):
    problem, dense = cut_problem, plain(cut_problem)
    args = operands(dense, "forward")
    code, grad = random_code(problem), random_grad(problem, integers=False)
    scattered = scatter(grad, code, problem.output_size, problem.pool)
    _, weight = operands(dense, "grad_input")
    _, x = operands(dense, "grad_weight")

    def run() -> list[Tensor]:
        return [
            *fused.forward(problem, *with_bias(args)),
            fused.grad_input(problem, grad, code, weight),
            *fused.grad_weight(problem, grad, code, x),
        ]

    threads(1)
    once = run()
    for count in (2, 3, 2):
        threads(count)
        assert all(map(torch.equal, run(), once)), f"{count} threads"
    assert_within_bound(once[2], dense, "grad_input", [scattered, weight], CPP.accuracy(problem, "grad_input"))
    assert_within_bound(once[3], dense, "grad_weight", [scattered, x], CPP.accuracy(problem, "grad_weight"))

    exact, magnitude = (reference(dense, "forward", each) for each in (args, [arg.abs() for arg in args]))
    eps = torch.finfo(getattr(torch, problem.dtype)).eps
    bound = eps * problem.reduction_length("forward") * magnitude + eps * exact.abs()
    value = once[0].double()
    best, _ = pooled(problem, activate(problem, exact))
    worst, _ = pooled(problem, bound)
    if problem.activation in KEEPS_PREACTIVATION:
        at_chosen = select(exact, once[1], problem.pool)
        assert ((value - at_chosen).abs() <= select(bound, once[1], problem.pool)).all()
        value = activate(problem, value)
    # No activation here is steeper than 1.13; its own rounding is a few units of the result.
    assert ((value - best).abs() <= 1.2 * worst + 8 * eps * (1 + best.abs())).all()
    chosen = select(activate(problem, exact), once[1], problem.pool)
    assert ((best - chosen).abs() <= 3 * worst + 16 * eps * (1 + best.abs())).all()
