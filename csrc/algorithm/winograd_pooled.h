// Winograd convolution, activation and max-pool in one pass: as pooled_forward.h, the sums coming from winograd_box.h.
//
// Tiles hold whole windows: a window equals its stride and divides the outputs of a tile, and there is no pool padding
// (the caller checks).
#pragma once

#include "pool_store.h"
#include "winograd_box.h"

namespace pvc {
namespace {

// Whether winograd_largest.h can give what is asked for.
template <typename T>
bool finds_largest(const PooledProblem& problem, const WinogradScheme<T>& scheme) {
    const int64_t* window = problem.pool_window;
    return window[0] == 2 && window[1] == 2 && window[2] == 2 && scheme.kernels.largest[0] != nullptr &&
           (problem.activation == Activation::relu || problem.activation == Activation::none);
}

template <typename T>
void store_windows(const PooledProblem& problem, const PooledTarget<T>& target, int64_t sample, const RowSums<T>& row) {
    const VolumeStrides& strides = target.strides;
    int64_t to = sample * strides.sample + row.channel * strides.channel;
    int64_t cells[3];
    for (int a = 0; a < 3; ++a) {
        const int64_t first = row.first[a] / 2;
        cells[a] = smaller(ceil_divide(row.count[a], int64_t{2}), problem.pooled_size[a] - first);
        to += first * strides.axis[a];
    }
    for (int64_t h = 0; h < cells[1]; ++h) {
        const RowStrides own = {row.stride[2], 1}, other = {strides.axis[2], strides.channel};
        const int64_t from = h * row.stride[1], place = to + h * strides.axis[1];
        copy_matrix(row.sums + from, own, target.pooled + place, other, cells[2], row.channels);
        if (target.code != nullptr) {
            copy_codes(row.codes + from, own, target.code + place, other, cells[2], row.channels);
        }
    }
}

template <typename T>
void winograd_pooled(const PooledProblem& problem, const int64_t outputs[3], const T* x, const T* weight, const T* bias,
                     T* pooled, uint8_t* code) {
    const Gather gather = gather_windows(problem);
    const WinogradBlocking<T> b = choose_winograd(gather, *winograd_scheme<T>(outputs, problem.conv.stride, false));
    const WinogradWeights<T> weights(gather, b, weight, bias);
    const PooledTarget<T> target = {
        pooled, code, volume_strides(problem.conv.layout, problem.conv.out_channels, problem.pooled_size)};
    const int64_t* window = problem.pool_window;
    if (finds_largest<T>(problem, *b.scheme)) {
        const bool relu = problem.activation == Activation::relu;
        const T least = relu ? T(0) : -static_cast<T>(__builtin_inf());
        return parallel_for(gather.batch * b.box_count(), [&](int64_t task) {
            WinogradBox<T> convolution(gather, weights, task);
            convolution.run_largest(x, least, code != nullptr, relu ? kNoVoxel : 0, [&](const RowSums<T>& row) {
                store_windows(problem, target, convolution.box.sample, row);
            });
        });
    }
    parallel_for(gather.batch * b.box_count(), [&](int64_t task) {
        WinogradBox<T> convolution(gather, weights, task);
        convolution.run(x, [&](const RowSums<T>& sums) {
            PoolRow<T> row = {};
            row.values = sums.sums;
            int64_t first[3], cells[3];
            for (int a = 0; a < 3; ++a) {
                first[a] = sums.first[a] / window[a];
                cells[a] = smaller(ceil_divide(sums.count[a], window[a]), problem.pooled_size[a] - first[a]);
                row.first[a] = sums.first[a];
                row.stride[a] = sums.stride[a];
            }
            row.cells = cells[2];
            for (int64_t d = 0; d < cells[0]; ++d) {
                for (int64_t h = 0; h < cells[1]; ++h) {
                    const int64_t cell[3] = {first[0] + d, first[1] + h, first[2]};
                    row.depth = window_part(problem, 0, cell[0]);
                    row.height = window_part(problem, 1, cell[1]);
                    pool_row(problem, target, false, convolution.box.sample, cell, sums.channel, sums.channels, row);
                }
            }
        });
    });
}

}  // namespace
}  // namespace pvc
