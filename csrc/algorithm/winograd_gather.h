// Forward and grad_input by Winograd: stride 1, one group, three taps or one per axis (the caller checks).
//
// `outputs` names the scheme, outputs of a tile per axis (1 where the kernel has one tap); it must be one of
// winograd_transforms.
#pragma once

#include "winograd_box.h"

namespace pvc {
namespace {

template <typename T>
bool has_winograd(const ConvProblem& problem, const int64_t outputs[3], bool transposed) {
    return winograd_scheme<T>(outputs, problem.stride, transposed) != nullptr;
}

template <typename T>
void winograd_gather(const Gather& gather, const WinogradScheme<T>& scheme, const T* source, const T* weight,
                     const T* bias, T* target) {
    const WinogradBlocking<T> b = choose_winograd(gather, scheme);
    const WinogradWeights<T> weights(gather, b, weight, bias);
    const int64_t size[3] = {gather.axis[0].count, gather.axis[1].count, gather.axis[2].count};
    const VolumeStrides strides = volume_strides(gather.layout, b.targets, size);
    const RowStrides to = {strides.axis[2] * b.lattice[2], strides.channel};
    const int64_t plane = strides.axis[0] * b.lattice[0], line = strides.axis[1] * b.lattice[1];
    parallel_for(gather.batch * b.box_count(), [&](int64_t task) {
        WinogradBox<T> convolution(gather, weights, task);
        convolution.run(source, [&](const RowSums<T>& row) {
            T* first = target + convolution.box.sample * strides.sample + row.channel * strides.channel;
            for (int a = 0; a < 3; ++a) first += row.first[a] * strides.axis[a];
            for (int64_t d = 0; d < row.count[0]; ++d) {
                for (int64_t h = 0; h < row.count[1]; ++h) {
                    copy_matrix(row.sums + d * row.stride[0] + h * row.stride[1], RowStrides{row.stride[2], 1},
                                first + d * plane + h * line, to, row.count[2], row.channels);
                }
            }
        });
    });
}

template <typename T>
void winograd_forward(const ConvProblem& problem, const int64_t outputs[3], const T* x, const T* weight, const T* bias,
                      T* y) {
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    winograd_gather(gather, *winograd_scheme<T>(outputs, problem.stride, false), x, weight, bias, y);
}

// Of kTransposed, whose transforms know which tap meets which voxel.
inline GatherAxis transposed_axis(const ConvProblem& problem, int axis) {
    const int64_t size = problem.input_size[axis];
    return {problem.output_size[axis], (problem.padding_begin[axis] - 1) / 2, 1, 3, 1, 0, 1, size, size, 0, 1};
}

template <typename T>
void winograd_grad_input(const ConvProblem& problem, const int64_t outputs[3], const T* grad_output, const T* weight,
                         T* grad_input) {
    Gather gather = gather_channels(problem, false);
    for (int axis = 0; axis < 3; ++axis) {
        gather.axis[axis] =
            problem.stride[axis] == 1 ? grad_input_axis(problem, axis, 0) : transposed_axis(problem, axis);
    }
    winograd_gather<T>(gather, *winograd_scheme<T>(outputs, problem.stride, true), grad_output, weight, nullptr,
                       grad_input);
}

}  // namespace
}  // namespace pvc
