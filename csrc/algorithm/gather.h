// Forward and grad_input as one kind of sum.
//
// Per axis, both passes gather source voxels into a target voxel:
//
//     target[first + j * step] = sum over t < taps of  source[start + j * source_step + t * tap_step] * w[k(t)],
//     k(t) = weight_first + t * weight_step,          source voxels outside the tensor count as zero.
//
// Forward: j is the output index, source_step the stride, tap_step the dilation, start = -padding_begin.
//
// grad_input: input voxel i receives grad_output[o] * w[k] for i = o * stride - padding_begin + k * dilation. Voxels of
// one residue r = i mod stride use the same taps: those with r + padding_begin - k * dilation divisible by stride,
// which are every q-th tap, q = stride / gcd(stride, dilation). With i = r + stride * j,
//
//     o = j + (r + padding_begin - k * dilation) / stride,
//
// so each residue is a gather with source_step 1 and, taken from the largest k down, tap_step q * dilation / stride.
// Stride 1 has one residue: the convolution with flipped weights. A residue without taps is zero.
#pragma once

#include "../problem.h"

namespace pvc {
namespace {

struct GatherAxis {
    int64_t source_size, source_start, source_step;
    int64_t taps, tap_step;
    int64_t weight_first, weight_step;
    int64_t count;  // target voxels of this gather
    int64_t target_size, target_first, target_step;
};

// Target voxels that are computed together: `extent` voxels from first + cell * step on. Windows of a pooling; they may
// overlap, leave gaps and reach beyond the target.
struct CellAxis {
    int64_t count, extent, step, first;
};

struct Gather {
    int64_t batch, groups;
    int64_t source_channels, target_channels;  // per group
    int64_t paired_channels;                   // where source_channels are pairs of channels: how many there are
    GatherAxis axis[3];
    CellAxis window[3];  // extent 0: every voxel is its own cell
    int64_t weight_group_stride, weight_source_stride, weight_target_stride, weight_tap_stride[3];
    Layout layout, source_layout;  // of the target and of the source

    CellAxis cells(int a) const { return window[a].extent == 0 ? CellAxis{axis[a].count, 1, 1, 0} : window[a]; }
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// `total` cut into the fewest parts of at most `most`, as even as can be: first the parts of size low, then of low + 1.
struct EvenCut {
    int64_t parts, low, narrow;

    EvenCut(int64_t total, int64_t most)
        : parts(ceil_divide(total, most)), low(total / parts), narrow(parts - total % parts) {}
    int64_t start(int64_t part) const { return part * low + larger(part - narrow, 0); }
    int64_t count(int64_t wide) const { return wide ? parts - narrow : narrow; }
    int64_t size(int64_t part) const { return low + (part >= narrow); }
};

// The same convolution with height and width as one axis, where each output voxel sees one input voxel: longer rows.
inline ConvProblem with_long_rows(ConvProblem problem) {
    constexpr int64_t kLongest = 1024;  // a row is the least that some plans pack
    for (int a = 0; a < 3; ++a) {
        const bool single = problem.kernel_size[a] == 1 && problem.stride[a] == 1;
        if (!single || problem.padding_begin[a] != 0 || problem.padding_end[a] != 0) return problem;
    }
    const int64_t row = problem.input_size[1] * problem.input_size[2];
    if (row > kLongest) return problem;
    problem.input_size[2] = problem.output_size[2] = row;
    problem.input_size[1] = problem.output_size[1] = 1;
    return problem;
}

inline GatherAxis forward_axis(const ConvProblem& problem, int axis) {
    return {problem.input_size[axis],
            -problem.padding_begin[axis],
            problem.stride[axis],
            problem.kernel_size[axis],
            problem.kernel_size[axis] == 1 ? 1 : problem.dilation[axis],
            0,
            1,
            problem.output_size[axis],
            problem.output_size[axis],
            0,
            1};
}

inline GatherAxis grad_input_axis(const ConvProblem& problem, int axis, int64_t residue) {
    const int64_t stride = problem.stride[axis], dilation = problem.dilation[axis];
    const int64_t kernel = problem.kernel_size[axis], input = problem.input_size[axis];
    const int64_t period = stride / greatest_common_divisor(stride, dilation);
    const int64_t shifted = residue + problem.padding_begin[axis];
    int64_t taps = 0, last_tap = 0;
    for (int64_t k = 0; k < kernel; ++k) {
        if ((shifted - k * dilation) % stride == 0) {
            ++taps;
            last_tap = k;
        }
    }
    return {problem.output_size[axis],
            taps == 0 ? 0 : (shifted - last_tap * dilation) / stride,
            1,
            taps,
            taps < 2 ? 1 : period * dilation / stride,
            last_tap,
            -period,
            residue < input ? ceil_divide(input - residue, stride) : 0,
            input,
            residue,
            stride};
}

// The sizes that do not depend on the axis; `forward` says which of the weight's channel axes is summed over.
inline Gather gather_channels(const ConvProblem& problem, bool forward) {
    const int64_t in = problem.in_channels / problem.groups, out = problem.out_channels / problem.groups;
    const int64_t* kernel = problem.kernel_size;
    const bool last = problem.weight_layout == Layout::ndhwc;
    const int64_t tap = last ? in : 1;
    const int64_t in_stride = last ? 1 : kernel[0] * kernel[1] * kernel[2];
    const int64_t out_stride = in * kernel[0] * kernel[1] * kernel[2];
    Gather gather = {};
    gather.batch = problem.batch;
    gather.groups = problem.groups;
    gather.source_channels = forward ? in : out;
    gather.target_channels = forward ? out : in;
    gather.weight_group_stride = out * out_stride;
    gather.weight_source_stride = forward ? in_stride : out_stride;
    gather.weight_target_stride = forward ? out_stride : in_stride;
    gather.weight_tap_stride[0] = kernel[1] * kernel[2] * tap;
    gather.weight_tap_stride[1] = kernel[2] * tap;
    gather.weight_tap_stride[2] = tap;
    gather.layout = problem.layout;
    gather.source_layout = problem.source_layout;
    return gather;
}

}  // namespace
}  // namespace pvc
