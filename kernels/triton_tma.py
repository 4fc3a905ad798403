"""Forward and grad_input of stride 1 as implicit GEMMs whose operands the tensor memory accelerator (TMA) fetches.

A tile of results is a box of voxels times a block of channels. For one tap and one block of summed channels its source
is a box of the same shape, shifted by the tap: one TMA copy, which puts zeros where the box hangs over the tensor's
ends. That is the padding, and no thread computes an address or a mask. grad_input is the same sum with the taps walked
in the other direction and the weight transposed.

Result tiles are transposed, (channels) x (voxels): Triton keeps a reshaped box in shared memory, where the matrix
units read it, only as the second operand of a product. The first is the weight, whose blocks are plain matrices of
(output channel) x (tap, channel). In ncdhw a box is a run of voxels along the width for each summed channel.

The sum may be split (split-K) into runs of the walk over (tap, channel); a second kernel adds the float32 partial
results in order, so bits are the same at every run.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_blocks import Blocks
from .triton_common import Launch, add_partials, ceil_div, weight_matrix
from .triton_epilogue import NO_EPILOGUE, Epilogue, apply_epilogue

Triple = tuple[int, int, int]


@lru_cache(maxsize=4096)
def box_of(size: tuple[int, ...], voxels: int) -> Triple:
    """The box of `voxels` voxels, a power of two on each axis, that covers `size` with the least surplus.

    Among equals the one that is longest along the width, then the height.
    """
    boxes = [
        (voxels // height // width, height, width)
        for width in _powers_of_2(voxels)
        for height in _powers_of_2(voxels // width)
    ]

    def covered(box: Triple) -> int:
        return math.prod(ceil_div(extent, side) * side for extent, side in zip(size, box, strict=True))

    return min(boxes, key=lambda box: (covered(box), -box[2], -box[1]))


def _powers_of_2(most: int) -> list[int]:
    return [1 << power for power in range(min(most, 256).bit_length())]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Triple,
    dilation: Triple,
    y: Tensor,
    blocks: Blocks,
    splits: int = 1,
    input_precision: str = "ieee",
    widen: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
) -> list[Launch]:
    """The launches that write the convolution of x with weight, plus bias, into y; stride 1, one group.

    Args:
        x: contiguous or channels_last_3d, as may be y; its dense axis, channels or width, in multiples of 16 bytes.
        weight: (C_out, C_in, K_d, K_h, K_w), stored as (C_out, K_d, K_h, K_w, C_in).
        padding: at the beginning of each axis; that at the end follows from the size of y.
    """
    first = (-padding[0], -padding[1], -padding[2])
    return _launches(x, weight, bias, first, dilation, y, blocks, splits, input_precision, widen, epilogue)


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    padding: Triple,
    dilation: Triple,
    grad_x: Tensor,
    blocks: Blocks,
    splits: int = 1,
    input_precision: str = "ieee",
    widen: bool = False,
) -> list[Launch]:
    """The launches that write the gradient with respect to the input into grad_x; see `forward` for the rest."""
    back = (-dilation[0], -dilation[1], -dilation[2])
    return _launches(
        grad_output, weight, None, padding, back, grad_x, blocks, splits, input_precision, widen, NO_EPILOGUE, True
    )


def _launches(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Triple,
    step: Triple,
    target: Tensor,
    blocks: Blocks,
    splits: int,
    input_precision: str,
    widen: bool,
    epilogue: Epilogue,
    transposed: bool = False,
) -> list[Launch]:
    summed, channels = source.shape[1], target.shape[1]
    kernel = tuple(weight.shape[2:])
    size = tuple(target.shape[2:])
    if is_channels_last(source):
        box = box_of(size, blocks.m)
        block_shape = [1, *box, blocks.k]
        order = (0, 2, 3, 4, 1)
    else:
        box = (1, 1, blocks.m)
        block_shape = [1, 1, 1, blocks.k, blocks.m]
        order = (0, 2, 3, 1, 4)
    tiles = tuple(ceil_div(extent, side) for extent, side in zip(size, box, strict=True))
    weight_block = [blocks.k, blocks.n] if transposed else [blocks.n, blocks.k]
    splits = min(splits, math.prod(kernel) * ceil_div(summed, blocks.k))
    partials = None if splits == 1 else torch.empty(splits, target.numel(), dtype=torch.float32, device=target.device)
    arguments = {
        "source_desc": described(source, order, block_shape),
        "weight_desc": TensorDescriptor.from_tensor(weight_matrix(weight), weight_block),
        "bias_ptr": weight if bias is None else bias,
        "target_ptr": target if partials is None else partials,
        "target_values": target.numel(),
        "summed": summed,
        "channels": channels,
        "source_depth": source.shape[2],
        "size": size,
        "tiles": tiles,
        "first": first,
        "step": step,
        "splits": splits,
        "target_strides": target.stride(),
        **(epilogue if partials is None else NO_EPILOGUE).arguments(target),
        "KERNEL": kernel,
        "BOX": box,
        "SOURCE_LAST": is_channels_last(source),
        "TARGET_LAST": is_channels_last(target),
        "WIDEN": widen,
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "PRECISION": input_precision,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
    }
    programs = target.shape[0] * math.prod(tiles) * ceil_div(channels, blocks.n) * splits
    multiply = Launch(tma_kernel, (programs,), arguments, blocks.options)
    return [multiply] if partials is None else [multiply, add_partials(partials, target, epilogue)]


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1


def described(tensor: Tensor, order: tuple[int, ...], block_shape: list[int]) -> TensorDescriptor:
    """A descriptor of a dense tensor with its axes in the given order, the last one dense."""
    dense = (0, 2, 3, 4, 1) if is_channels_last(tensor) else (0, 1, 2, 3, 4)
    # Not tensor.stride(), which says anything of an axis of one.
    strides, step = [0] * 5, 1
    for axis in reversed(dense):
        strides[axis], step = step, step * tensor.shape[axis]
    return TensorDescriptor(
        tensor, [tensor.shape[axis] for axis in order], [strides[axis] for axis in order], block_shape
    )


@triton.jit
def reaching_taps(first, step, BOX: tl.constexpr, size, TAPS: tl.constexpr):
    """(begin, end) of the taps t for which some of first + t * step + (0 ... BOX - 1) is in [0, size)."""
    begin = first * 0 + TAPS
    count = first * 0
    for tap in tl.static_range(TAPS):
        reaches = (first + tap * step > -BOX) & (first + tap * step < size)
        begin = tl.where(reaches, tl.minimum(begin, tap), begin)
        count += reaches.to(tl.int32)
    return begin, begin + count


@triton.jit
def tma_kernel(
    source_desc,
    weight_desc,
    bias_ptr,
    target_ptr,
    target_values,
    summed,
    channels,
    source_depth,
    size,
    tiles,
    first,
    step,
    splits,
    target_strides,
    residual_ptr,
    negative_slope,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,
    BOX: tl.constexpr,
    SOURCE_LAST: tl.constexpr,
    TARGET_LAST: tl.constexpr,
    WIDEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth, height, width = size
    tiles_d, tiles_h, tiles_w = tiles
    d_step, h_step, w_step = step
    target_n, target_c, target_d, target_h, target_w = target_strides
    BLOCK_M: tl.constexpr = BOX[0] * BOX[1] * BOX[2]

    # Blocks of channels follow each other: they read the same boxes.
    blocks_n = (channels + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    channel = program % blocks_n * BLOCK_N
    split = program // blocks_n % splits
    tile = program // blocks_n // splits
    w = tile % tiles_w * BOX[2]
    h = tile // tiles_w % tiles_h * BOX[1]
    d = tile // tiles_w // tiles_h % tiles_d * BOX[0]
    n = tile // tiles_w // tiles_h // tiles_d
    d_first = d + first[0]
    h_first = h + first[1]
    w_first = w + first[2]

    # Taps whose box lies wholly above or below the source are left out.
    plane_steps = KERNEL[1] * KERNEL[2] * ((summed + BLOCK_K - 1) // BLOCK_K)
    taps_begin, taps_end = reaching_taps(d_first, d_step, BOX[0], source_depth, KERNEL[0])
    steps = (taps_end - taps_begin) * plane_steps
    steps_per_split = (steps + splits - 1) // splits
    begin = taps_begin * plane_steps + split * steps_per_split
    end = tl.minimum(begin + steps_per_split, taps_end * plane_steps)
    summed_blocks = (summed + BLOCK_K - 1) // BLOCK_K
    tap = begin // summed_blocks
    s = begin % summed_blocks * BLOCK_K

    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for _ in range(begin, end):
        d_in = d_first + tap // (KERNEL[1] * KERNEL[2]) * d_step
        h_in = h_first + tap // KERNEL[2] % KERNEL[1] * h_step
        w_in = w_first + tap % KERNEL[2] * w_step
        column = tap * (channels if TRANSPOSED else summed)
        if SOURCE_LAST:
            source = source_desc.load([n, d_in, h_in, w_in, s]).reshape(BLOCK_M, BLOCK_K).T
        else:
            source = source_desc.load([n, d_in, h_in, s, w_in]).reshape(BLOCK_K, BLOCK_M)
        weight = weight_desc.load([s, column + channel]).T if TRANSPOSED else weight_desc.load([channel, column + s])
        if WIDEN:
            weight = weight.to(tl.float32)
            source = source.to(tl.float32)
        total = tl.dot(weight, source, total, input_precision=PRECISION)
        # Without a branch: Triton fetches ahead only what it can move across steps.
        tap += (s + BLOCK_K >= summed).to(tl.int32)
        s = tl.where(s + BLOCK_K >= summed, 0, s + BLOCK_K)

    c = channel + tl.arange(0, BLOCK_N)
    if HAS_BIAS and split == 0:
        total += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    voxel = tl.arange(0, BLOCK_M)
    w_out = w + voxel % BOX[2]
    h_out = h + voxel // BOX[2] % BOX[1]
    d_out = d + voxel // (BOX[2] * BOX[1])
    valid = (w_out < width) & (h_out < height) & (d_out < depth)
    n_offset = n.to(tl.int64) * target_n
    voxels = d_out.to(tl.int64) * target_d + h_out.to(tl.int64) * target_h + w_out.to(tl.int64) * target_w
    if TARGET_LAST:
        place = n_offset + voxels[:, None] + c[None, :]
        inside = valid[:, None] & (c < channels)[None, :]
        total = total.T
    else:
        place = n_offset + (c.to(tl.int64) * target_c)[:, None] + voxels[None, :]
        inside = (c < channels)[:, None] & valid[None, :]
    total = apply_epilogue(total, residual_ptr + place, inside, negative_slope, HAS_RESIDUAL, ACTIVATION)
    target = target_ptr + split.to(tl.int64) * target_values
    tl.store(target + place, total.to(target_ptr.dtype.element_ty), mask=inside)
