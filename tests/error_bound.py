"""The float64 reference, and the error that `pyvolconv.backends.base.Accuracy` allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyvolconv.backends.base import Accuracy, Backend
from pyvolconv.backends.registry import REGISTRY
from pyvolconv.problem import ConvProblem, Pass


def run_a_pass(backend: Backend, problem: ConvProblem, pass_: Pass, args: list[Tensor]) -> Tensor:
    """As `pyvolconv.ops` calls a backend."""
    if pass_ == "forward":
        x, weight, *bias = args
        return backend.forward(problem, x, weight, bias[0] if bias else None)
    return getattr(backend, pass_)(problem, *args)


def exact_result(problem: ConvProblem, pass_: Pass, args: list[Tensor]) -> Tensor:
    """ATen in float64."""
    aten = REGISTRY[-1]
    exact = problem.with_(dtype="float64", layout="ncdhw", device="cpu")
    return run_a_pass(aten, exact, pass_, [arg.detach().cpu().double().contiguous() for arg in args])


def summed_magnitude(problem: ConvProblem, pass_: Pass, args: list[Tensor], reach: tuple[int, int, int]) -> Tensor:
    """The pass over absolute values; with a reach its largest value nearby, also beyond the ends of the result."""
    if not any(reach):
        return exact_result(problem, pass_, args)
    source, other, *bias = (arg.cpu().double().contiguous() for arg in args)
    begin, end = zip(*problem.padding, strict=True)
    if pass_ == "grad_weight":
        # source and other are grad_output and x. Taps beyond the kernel are those of one that is 2 * reach longer; as
        # a convolution of x with grad_output, stride and dilation change places.
        x = _padded(other, begin, end, [r * d for r, d in zip(reach, problem.dilation, strict=True)])
        full = torch.nn.functional.conv3d(
            x.transpose(0, 1), source.transpose(0, 1), stride=problem.dilation, dilation=problem.stride
        ).transpose(0, 1)
        depth, height, width = (k + 2 * r for k, r in zip(problem.kernel_size, reach, strict=True))
        full = full[:, :, :depth, :height, :width]
    elif pass_ == "grad_input":
        full = torch.nn.functional.conv_transpose3d(source, other, stride=problem.stride, dilation=problem.dilation)
        missing = [i + p - n for i, p, n in zip(problem.input_size, begin, full.shape[2:], strict=True)]
        full = _padded(full, [-p for p in begin], missing, reach)
    else:
        x = _padded(source, begin, end, [r * s for r, s in zip(reach, problem.stride, strict=True)])
        full = torch.nn.functional.conv3d(x, other, *bias, stride=problem.stride, dilation=problem.dilation)
    return _largest_nearby(full, reach)


def _largest_nearby(values: Tensor, reach: tuple[int, int, int]) -> Tensor:
    """The largest value within `reach` voxels per axis, axis by axis, which is far less work than whole windows."""
    for axis, voxels in enumerate(reach):
        window = [2 * voxels + 1 if axis == other else 1 for other in range(3)]
        values = torch.nn.functional.max_pool3d(values, window, 1)
    return values


def _padded(values: Tensor, begin: Sequence[int], end: Sequence[int], more: Sequence[int]) -> Tensor:
    """Zeros around the voxels, `more` on both ends of an axis; negative numbers cut off."""
    sides = [side + m for b, e, m in zip(begin, end, more, strict=True) for side in (b, e)]
    return torch.nn.functional.pad(values, [side for a in (4, 2, 0) for side in sides[a : a + 2]])


def relative_error(got: Tensor, problem: ConvProblem, pass_: Pass, args: list[Tensor], accuracy: Accuracy) -> float:
    """The largest error as a multiple of the bound that `Accuracy` states."""
    exact, magnitude = _exact(problem, pass_, args, accuracy.reach)
    unit = torch.finfo(getattr(torch, accuracy.accumulate_dtype)).eps
    bound = accuracy.constant * unit * problem.reduction_length(pass_) * magnitude
    result = torch.finfo(got.dtype)
    bound += result.eps * exact.abs()
    bound[magnitude > 0] += result.tiny * result.eps  # numbers below `tiny` are that far apart
    error = (got.detach().cpu().double() - exact).abs()
    # Where nothing is summed the bound is zero and so must the error be; NaN is never within a bound.
    ratio = torch.where(bound > 0, error / bound, torch.where(error == 0, 0.0, torch.inf))
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def largest_constant(problem: ConvProblem, pass_: Pass) -> float:
    """Up to which `Accuracy.constant` a bound sees that a product is missing, in every problem of the set.

    Of short sums more than of long ones: `cpp.amx` rounds several times for each product of a tap with one channel.
    """
    return min(max(2.0, 1000 / problem.reduction_length(pass_)), 4.0)


class _Exact:
    """The reference and its magnitude for the operands that were asked about last: many results have the same."""

    def __init__(self) -> None:
        self.key: object = None
        self.args: list[Tensor] = []
        self.found: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, problem: ConvProblem, pass_: Pass, args: list[Tensor], reach: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        key = (problem, pass_, reach, [(id(arg), arg._version) for arg in args])
        if self.found is None or self.key != key:
            magnitude = summed_magnitude(problem, pass_, [arg.detach().abs() for arg in args], reach)
            # Holding the operands keeps their ids theirs.
            self.key, self.args, self.found = key, args, (exact_result(problem, pass_, args), magnitude)
        return self.found


_exact = _Exact()


Product = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def defining_products(problem: ConvProblem) -> Iterator[Product]:
    """(index into x, into w, into y) of every product of the defining sum, padding left out."""
    in_group = problem.in_channels // problem.groups
    out_group = problem.out_channels // problem.groups
    taps = list(itertools.product(*map(range, problem.kernel_size)))
    for voxel in itertools.product(*map(range, problem.output_size)):
        for tap in taps:
            source = tuple(
                i * stride - begin + k * dilation
                for i, k, stride, (begin, _), dilation in zip(
                    voxel, tap, problem.stride, problem.padding, problem.dilation, strict=True
                )
            )
            if any(not 0 <= s < size for s, size in zip(source, problem.input_size, strict=True)):
                continue
            for n, o, c in itertools.product(range(problem.batch), range(problem.out_channels), range(in_group)):
                yield (n, o // out_group * in_group + c, *source), (o, c, *tap), (n, o, *voxel)
