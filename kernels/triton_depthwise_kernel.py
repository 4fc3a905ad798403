"""The kernel of depthwise and small-group convolution that `triton_depthwise` launches, forward and backward.

Both passes gather. Along an axis, output residue + RESULT_STEP * q sums over 0 <= k < TAPS the products of

    source voxel  q * SOURCE_STEP - before + k * SPREAD      and weight tap  first_tap + k * TAP_STEP

Forward: residue 0, SOURCE_STEP the stride, SPREAD the dilation. Gradient: one phase of the stride for each residue (see
`triton_grad_input`), SOURCE_STEP 1, and the taps in reverse. Outputs of one tile are APART = SPREAD / gcd(SOURCE_STEP,
SPREAD) apart, so that they share source voxels: those of output i and tap k are at i * MOVE + k times SPREAD.
"""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations of kernels: an argument without one is a run-time value)
# ruff: noqa: RUF005 (nor does it know tuples with a star)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_grad_input import phase_taps


@triton.jit
def first_output(tile, count: tl.constexpr, APART: tl.constexpr):
    """The first output of a tile whose `count` outputs are APART apart."""
    return tile // APART * (APART * count) + tile % APART


@triton.jit
def gradient_axis(residue, padding, KERNEL, STRIDE, DILATION, TAP_STEP, SPREAD: tl.constexpr, TAPS: tl.constexpr):
    """(before, first tap) of the phase of a residue, taps counted in reverse; taps from KERNEL on are none."""
    first, _, shift = phase_taps(residue + padding, KERNEL, STRIDE, DILATION, TAP_STEP)
    return SPREAD * (TAPS - 1) - shift, first + TAP_STEP * (TAPS - 1)


@triton.jit
def load_weights(
    weight_rows,
    taps_first,
    by_tap,
    lane,
    lanes,
    KERNEL: tl.constexpr,
    TAP_STEP: tl.constexpr,
    TAPS: tl.constexpr,
    WALK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """A tuple of WALK x TAPS[1] x TAPS[2] weights of each lane, from tap `taps_first` on."""
    # An element of a tuple that was handed on is no constexpr until it has a name.
    TAPS_H: tl.constexpr = TAPS[1]
    TAPS_W: tl.constexpr = TAPS[2]
    weights = ()
    d_first, h_first, w_first = taps_first
    for d_nth in tl.static_range(WALK):
        for h_nth in tl.static_range(TAPS_H):
            for w_nth in tl.static_range(TAPS_W):
                d = d_first + d_nth * TAP_STEP[0]
                h = h_first + h_nth * TAP_STEP[1]
                w = w_first + w_nth * TAP_STEP[2]
                there = lanes
                if GRADIENT:
                    there = tl.where((d < KERNEL[0]) & (h < KERNEL[1]) & (w < KERNEL[2]), lanes, 0)
                weight = tl.load(
                    weight_rows + ((d * KERNEL[1] + h) * KERNEL[2] + w) * by_tap, mask=lane < there, other=0.0
                )
                weights = weights + (weight.to(tl.float32),)
    return weights


@triton.jit
def add_plane(
    totals,
    weights,
    plane,
    h_first,
    w_first,
    height,
    width,
    source_h,
    SOURCE_W: tl.constexpr,
    SPREAD: tl.constexpr,
    MOVE: tl.constexpr,
    TAPS: tl.constexpr,
    WALK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`totals`, WALK x HEIGHT x WIDTH tensors, plus the products of one plane of the source, row by row."""
    TAPS_H: tl.constexpr = TAPS[1]
    TAPS_W: tl.constexpr = TAPS[2]
    MOVE_H: tl.constexpr = MOVE[1]
    MOVE_W: tl.constexpr = MOVE[2]
    for row in tl.static_range((HEIGHT - 1) * MOVE_H + TAPS_H):
        h_valid = (h_first + row * SPREAD[1]).to(tl.uint32) < height
        values = ()
        for column in tl.static_range((WIDTH - 1) * MOVE_W + TAPS_W):
            valid = h_valid & ((w_first + column * SPREAD[2]).to(tl.uint32) < width)
            value = tl.load(plane + row * SPREAD[1] * source_h + column * SPREAD[2] * SOURCE_W, mask=valid, other=0.0)
            values = values + (value.to(tl.float32),)
        sums = ()
        for d_nth in tl.static_range(WALK):
            for i in tl.static_range(HEIGHT):
                for j in tl.static_range(WIDTH):
                    total = totals[(d_nth * HEIGHT + i) * WIDTH + j]
                    if row >= i * MOVE_H and row < i * MOVE_H + TAPS_H:
                        for w_nth in tl.static_range(TAPS_W):
                            weight = weights[(d_nth * TAPS_H + row - i * MOVE_H) * TAPS_W + w_nth]
                            total = tl.fma(values[j * MOVE_W + w_nth], weight, total)
                    sums = sums + (total,)
        totals = sums
    return totals


@triton.jit
def depthwise_kernel(
    source_ptr,
    weight_ptr,
    bias_ptr,
    result_ptr,
    blocks,
    counts,
    steps,
    size_source,
    size_result,
    padding,
    source_strides,
    result_strides,
    weight_steps,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    TAP_STEP: tl.constexpr,
    SOURCE_STEP: tl.constexpr,
    SPREAD: tl.constexpr,
    RESULT_STEP: tl.constexpr,
    APART: tl.constexpr,
    MOVE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUMMED: tl.constexpr,
    RESULTS: tl.constexpr,
    SOURCE_W: tl.constexpr,
    RESULT_W: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    WALK: tl.constexpr,
    HOLD: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    depth, height, width = size_source
    depth_result, height_result, width_result = size_result
    source_n, source_c, source_d, source_h = source_strides
    result_n, result_c, result_d, result_h = result_strides
    by_group, by_result, by_summed, by_tap = weight_steps
    d_tiles, h_tiles, w_tiles = counts
    if SIDE_BY_SIDE:
        # Only says so to the compiler.
        result_n = result_n // WIDTH * WIDTH
        result_c = result_c // WIDTH * WIDTH
        result_d = result_d // WIDTH * WIDTH
        result_h = result_h // WIDTH * WIDTH
    PLANE: tl.constexpr = HEIGHT * WIDTH
    AHEAD: tl.constexpr = WALK - 1
    W_STEP: tl.constexpr = APART[2] * RESULT_STEP[2]

    program = tl.program_id(0)
    lane = program % blocks * LANES + tl.arange(0, LANES)  # (L,)
    d_tile = program // blocks % d_tiles
    phase = program // blocks // d_tiles % (RESULT_STEP[0] * RESULT_STEP[1] * RESULT_STEP[2])
    n = (program // blocks // d_tiles // (RESULT_STEP[0] * RESULT_STEP[1] * RESULT_STEP[2])).to(tl.int64)
    if CHANNELS_LAST:
        c = lane % CHANNELS
        tile = lane // CHANNELS
    else:
        tile = lane % (h_tiles * w_tiles)
        c = lane // (h_tiles * w_tiles)
    lanes = h_tiles * w_tiles * CHANNELS
    lane_valid = lane < lanes

    d_residue = phase // (RESULT_STEP[1] * RESULT_STEP[2])
    h_residue = phase // RESULT_STEP[2] % RESULT_STEP[1]
    w_residue = phase % RESULT_STEP[2]
    if GRADIENT:
        d_before, d_tap = gradient_axis(
            d_residue, padding[0], KERNEL[0], STRIDE[0], DILATION[0], TAP_STEP[0], SPREAD[0], TAPS[0]
        )
        h_before, h_tap = gradient_axis(
            h_residue, padding[1], KERNEL[1], STRIDE[1], DILATION[1], TAP_STEP[1], SPREAD[1], TAPS[1]
        )
        w_before, w_tap = gradient_axis(
            w_residue, padding[2], KERNEL[2], STRIDE[2], DILATION[2], TAP_STEP[2], SPREAD[2], TAPS[2]
        )
    else:
        d_before, h_before, w_before = padding
        d_tap = 0
        h_tap = 0
        w_tap = 0
    TOWARDS: tl.constexpr = (-TAP_STEP[0], -TAP_STEP[1], -TAP_STEP[2]) if GRADIENT else TAP_STEP

    d_output = first_output(d_tile, steps, APART[0])
    h_output = first_output(tile // w_tiles, HEIGHT, APART[1])  # (L,)
    w_output = first_output(tile % w_tiles, WIDTH, APART[2])
    d_first = d_output * SOURCE_STEP[0] - d_before
    # A row that is far from all others stands for lanes that are none.
    h_first = tl.where(lane_valid, h_output * SOURCE_STEP[1] - h_before, -(2**30))
    w_first = w_output * SOURCE_STEP[2] - w_before
    group = c // RESULTS
    columns = (
        source_ptr
        + n * source_n
        + (group * SUMMED).to(tl.int64) * source_c
        + h_first.to(tl.int64) * source_h
        + w_first.to(tl.int64) * SOURCE_W
    )  # (L,)
    weight_rows = weight_ptr + group * by_group + c % RESULTS * by_result
    h = h_output * RESULT_STEP[1] + h_residue
    w = w_output * RESULT_STEP[2] + w_residue
    result_columns = (
        result_ptr + n * result_n + c.to(tl.int64) * result_c + h.to(tl.int64) * result_h + w.to(tl.int64) * RESULT_W
    )
    start = tl.full((LANES,), 0.0, tl.float32)
    if HAS_BIAS:
        start = tl.load(bias_ptr + c, mask=lane_valid, other=0.0).to(tl.float32)
    if HOLD:
        weights = load_weights(
            weight_rows, (d_tap, h_tap, w_tap), by_tap, lane, lanes, KERNEL, TOWARDS, TAPS, WALK, GRADIENT
        )

    totals = ()
    for _ in tl.static_range(WALK * PLANE):
        totals = totals + (start,)
    for step in range(0, steps + AHEAD):
        # The sums that this step begins in front, those that the last one completed left out.
        carried = ()
        for _ in tl.static_range(PLANE):
            carried = carried + (start,)
        for nth in tl.static_range(AHEAD * PLANE):
            carried = carried + (totals[nth],)
        totals = carried
        for part in range(0, TAPS[0] // WALK):
            d = d_first + part * SPREAD[0] + step * (SPREAD[0] * MOVE[0])
            plane_height = tl.where((d >= 0) & (d < depth), height, 0).to(tl.uint32)
            for channel in range(0, SUMMED):
                if not HOLD:
                    weights = load_weights(
                        weight_rows + channel * by_summed,
                        (d_tap + part * TOWARDS[0], h_tap, w_tap),
                        by_tap,
                        lane,
                        lanes,
                        KERNEL,
                        TOWARDS,
                        TAPS,
                        WALK,
                        GRADIENT,
                    )
                totals = add_plane(
                    totals,
                    weights,
                    columns + (tl.cast(d, tl.int64) * source_d + tl.cast(channel, tl.int64) * source_c),
                    h_first,
                    w_first,
                    plane_height,
                    tl.cast(width, tl.uint32),
                    tl.cast(source_h, tl.int64),
                    SOURCE_W,
                    SPREAD,
                    MOVE,
                    TAPS,
                    WALK,
                    HEIGHT,
                    WIDTH,
                )
        d_result = (d_output + (step - AHEAD) * APART[0]) * RESULT_STEP[0] + d_residue
        if (step >= AHEAD) & (d_result < depth_result):
            plane = result_columns + tl.cast(d_result, tl.int64) * result_d
            for i in tl.static_range(HEIGHT):
                row = plane + i * APART[1] * RESULT_STEP[1] * tl.cast(result_h, tl.int64)
                row_valid = lane_valid & (h + i * APART[1] * RESULT_STEP[1] < height_result)
                if not SIDE_BY_SIDE:
                    for j in tl.static_range(WIDTH):
                        tl.store(
                            row + j * W_STEP * RESULT_W,
                            totals[(AHEAD * HEIGHT + i) * WIDTH + j].to(result_ptr.dtype.element_ty),
                            mask=row_valid & (w + j * W_STEP < width_result),
                        )
                else:
                    # A row ends with a tile: no output of one is beyond its end.
                    if WIDTH == 2:
                        side_by_side = tl.join(
                            totals[(AHEAD * HEIGHT + i) * WIDTH], totals[(AHEAD * HEIGHT + i) * WIDTH + 1]
                        )
                    else:
                        even = tl.join(totals[(AHEAD * HEIGHT + i) * WIDTH], totals[(AHEAD * HEIGHT + i) * WIDTH + 2])
                        odd = tl.join(
                            totals[(AHEAD * HEIGHT + i) * WIDTH + 1], totals[(AHEAD * HEIGHT + i) * WIDTH + 3]
                        )
                        side_by_side = tl.reshape(tl.join(even, odd), (LANES, WIDTH))
                    tl.store(
                        row[:, None] + tl.arange(0, WIDTH)[None, :],
                        side_by_side.to(result_ptr.dtype.element_ty),
                        mask=row_valid[:, None],
                    )
