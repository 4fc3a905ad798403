"""`cpp.amx`: float32 convolution on a processor's matrix unit (AMX), whose operands are bfloat16, from csrc/.

A float32 value is exactly the sum of three bfloat16 ones. Of the nine products of two values' parts the six that matter
are summed in float32, which leaves an error of the order of float32's own; the unit is 16 times as fast as float32
FMAs, so that convolution runs above their peak; Winograd's F(2, 3) along one axis makes three taps two. Where
`set_precision("high")` allows more rounding, two parts and three products do; where
`torch.backends.mkldnn.conv.fp32_precision` is "bf16", one (G. Henry, P. Tang, A. Heinecke, "Leveraging the bfloat16
Artificial Intelligence Datatype For Higher-Precision Computations", 2019).

Operands with an infinity, a NaN, or a value that rounds to an infinite bfloat16 have no such parts: those are
computed by `cpp.direct`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..precision import convolves_float32_in_bfloat16, get_precision
from ..problem import ConvProblem, Pass
from .base import Accuracy, Backend, empty
from .cpp import call, host_reasons, kernels, load_extension, mixed_plan_of, plan_of

PRODUCTS = {1: 1, 2: 3, 3: 6}
"""Products of two values' parts that are summed, by the number of parts."""

ROUNDING = {1: 2.0**16, 2: 2.0**8, 3: 0.0}
"""What a product loses beside the rounding of sums, in steps of float32's eps."""


FEWEST_TRANSFORMED = 640
"""Voxels; with fewer, transforming weights takes longer than what it saves."""

TILE, STEP = 16, 32
"""Rows and columns of a tile of sums, and the summed values of one product of tiles."""


class CppAmx(Backend):
    """Any window, stride and dilation, both layouts; one group."""

    name = "cpp.amx"
    family = "cpp"
    mixes_layouts = ("x", "weight")
    plain = False
    """Compute as the matrix unit would without one, slowly: only for tests."""

    def unsupported_reasons(self, problem: ConvProblem, pass_: Pass) -> list[str]:
        _, missing = load_extension()
        if missing:
            return [missing]
        reasons = host_reasons(problem, ("float32",))
        if problem.groups != 1:
            reasons.append(f"it has {problem.groups} groups; it needs one")
        if problem.pool is not None:
            reasons.append("has no pass fused with a pool")
        if not (self.plain or kernels().has_matrix_unit()):
            reasons.append(f"instruction set {kernels().current_isa()} of this processor has no AMX, or may not use it")
        return reasons

    def forward(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(problem, "output", x)
        plan, options = mixed_plan_of(problem, x, weight), (parts(), self.plain)
        call(kernels().split_forward, plan, x, weight, bias, y, options=options)
        return y

    def grad_input(self, problem: ConvProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
        return self.transposed(problem, grad_output, weight, None)

    def transposed(self, problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = empty(problem, "input", x)
        options = (parts(), self.plain)
        added = call(kernels().split_grad_input, plan_of(problem), x, weight, bias, result, options=options)
        return result if bias is None or added else result.add_(bias.view(-1, 1, 1, 1))

    def grad_weight(self, problem: ConvProblem, grad_output: Tensor, x: Tensor) -> Tensor:
        result = empty(problem, "weight", x)
        options = (parts(), self.plain)
        call(kernels().split_grad_weight, plan_of(problem), grad_output, x, result, options=options)
        return result

    def accuracy(self, problem: ConvProblem, pass_: Pass) -> Accuracy:
        count = parts()
        length = problem.reduction_length(pass_)
        sources = problem.in_channels if pass_ == "forward" else problem.out_channels
        depth, height = (_mixed_voxels(problem, pass_, axis) for axis in (0, 1))
        mixed = 2 if depth or height else 1
        # The unit sums up to 32 products of the taps of a run and adds that sum to what was there: half a step of
        # rounding for each addition, as in a plain sum, and what parts leave out.
        run = sources * _taps_of_a_run(problem, pass_)
        additions = PRODUCTS[count] * (length // run) * -(-run // STEP) + min(length, 17)
        return Accuracy(
            constant=max(float(mixed), (additions / 2 + 0.5 + mixed * ROUNDING[count]) / length),
            accumulate_dtype="float32",
            bitwise_reproducible=True,
            reach=(depth, height, 0),
            exact_integers=count == 3,
        )

    def expected_efficiency(self, problem: ConvProblem, pass_: Pass) -> float:
        """The expected time in FMAs at peak, fitted to measurements (docs/performance.md): 7.5 products of parts take
        as long as one, rows and columns of tiles that are computed in vain included; a part of a source value takes 18
        (ncdhw: 26), each time it is packed, a result 37 (52), a part of a weight 50."""
        if pass_ == "grad_weight":
            return problem.flops(pass_) / 2 / _grad_weight_time(problem, parts())
        count = parts()
        sources, targets, size = problem.in_channels, problem.out_channels, problem.output_size
        strides, packed = (1, 1, 1), float(math.prod(problem.stride))
        columns = _computed(targets, TILE) * targets
        if pass_ == "grad_input":
            sources, targets, size = targets, sources, problem.input_size
            columns = _computed(targets, TILE) * targets
            strides, residues = problem.stride, math.prod(problem.stride)
            packed = 1.0  # where a source value is packed for every residue of the stride
            if residues <= 8 and max(problem.dilation) == 1:
                packed = 1 / residues
                if residues * targets <= 2 * TILE:
                    # All residues' results are columns of one product with the taps of all.
                    union = math.prod(-(-k // s) for k, s in zip(problem.kernel_size, strides, strict=True))
                    shared = union * _computed(residues * targets, TILE) * targets
                    columns = min(columns, shared * residues / math.prod(problem.kernel_size))
        taps = [max(1.0, k / s) for k, s in zip(problem.kernel_size, strides, strict=True)]
        mixed = [_computed(size[axis], 2) for axis in (0, 1) if _may_be_transformed(problem, pass_, axis)]
        along = 2 / 3 * min(mixed) if mixed else 1.0
        if problem.dilation[2] == 1:
            steps = -(-math.ceil(taps[2] * sources) // STEP)
        else:
            steps = math.ceil(taps[2]) * -(-sources // STEP)
        width = math.ceil(size[2] / strides[2])
        rows = min(_computed(width, TILE), 1.05 * (width + problem.kernel_size[2] - 1) / width)
        voxels = problem.batch * math.prod(size)
        products = PRODUCTS[count] * taps[0] * taps[1] * along * steps * STEP * rows * columns
        around = 2.0 if mixed else 1.5 if max(problem.kernel_size[:2]) > 1 else 1.0
        in_order = problem.layout == "ndhwc"
        packing = around * packed * sources * count * (18 if in_order else 26)
        storing = targets * (37 if in_order else 52)
        weights = math.prod(problem.weight_shape) * count * 50
        time = voxels * (products / 7.5 + packing + storing) + weights
        return problem.flops(pass_) / 2 / time


def _grad_weight_time(problem: ConvProblem, count: int) -> float:
    """The expected time in FMAs at peak. Rows of tiles are target channels, columns are taps along the width and source
    channels, and 32 voxels are summed in a step, which takes 2400 FMAs with two parts and 4400 with three; a value of
    an operand takes 85 each time it is packed, a part of it 10 more."""
    voxels = problem.batch * math.prod(problem.output_size)
    axes = list(zip(problem.kernel_size, problem.stride, problem.dilation, strict=True))
    packed = voxels * math.prod(s + ((k - 1) * min(d, 2) + 1 - s) / 8 for k, s, d in axes[:2])
    width, kernel = problem.output_size[2], problem.kernel_size[2]
    positions = ((width - 1) * problem.stride[2] + kernel) / width
    columns = -(-kernel * problem.in_channels // TILE)
    rows = -(-problem.out_channels // TILE)
    tiles = math.prod(problem.kernel_size[:2]) * columns * rows
    splits = min(max(1.0, 2000 / tiles), 8.0)
    products = voxels / (STEP * 0.94) * tiles * {1: 1100, 2: 2400, 3: 4400}[count]
    packing = packed * (problem.in_channels * positions * 85 + TILE * columns * count * 10)
    gradient = voxels * TILE * rows * 95
    time = products + packing + gradient + splits * tiles * 17_000
    return 2 * time if 2 < kernel <= problem.stride[2] else time  # windows apart from one another: packed one by one


def _may_be_transformed(problem: ConvProblem, pass_: Pass, axis: int) -> bool:
    if pass_ == "grad_weight" or math.prod(problem.kernel_size) < 27:
        return False
    size = problem.input_size if pass_ == "grad_input" else problem.output_size
    if problem.batch * math.prod(size) < FEWEST_TRANSFORMED:
        return False
    return problem.kernel_size[axis] == 3 and problem.stride[axis] == problem.dilation[axis] == 1


def _taps_of_a_run(problem: ConvProblem, pass_: Pass) -> int:
    """How many taps along the width the products of a step may come from, at the least."""
    kernel, stride, dilation = problem.kernel_size[2], problem.stride[2], problem.dilation[2]
    if pass_ == "forward":
        return kernel if dilation == 1 and stride <= kernel else 1
    if pass_ == "grad_input":
        return -(-kernel * dilation // stride) if stride % dilation == 0 else 1
    return 1


def _mixed_voxels(problem: ConvProblem, pass_: Pass, axis: int) -> int:
    """How far apart along an axis voxels may be that a transform mixes; 0 where there is none.

    An input voxel's gradient has those of every `period`-th tap, and where three of these are neighbours in grad_output
    (csrc/algorithm/split_plan.h) the tile has voxels that are a stride apart, of kernels longer than three taps too.
    """
    kernel, stride, dilation = problem.kernel_size[axis], problem.stride[axis], problem.dilation[axis]
    if pass_ != "grad_input":
        return 3 * _may_be_transformed(problem, pass_, axis)
    if stride % dilation != 0:
        return 0
    period = stride // dilation
    return 3 * stride if 3 in (kernel // period, -(-kernel // period)) else 0


def _computed(size: int, tile: int) -> float:
    """How many times as much is computed where an axis is cut into tiles."""
    return -(-size // tile) * tile / size


def parts() -> int:
    """Into how many bfloat16 values the user's settings let a float32 value be split."""
    if convolves_float32_in_bfloat16():
        return 1
    return 2 if get_precision() == "high" else 3
