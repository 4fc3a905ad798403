// Gradient of the bias behind a max-pool: the sum of all gradients that reach a voxel, channel by channel.
//
// One part of the sum per sample and pooled depth, added up in order: the same bits for any number of threads.
#pragma once

#include "../microkernel/select_sum.h"
#include "sparse_gradient.h"

namespace pvc {
namespace {

// What `lanes` gradients give to the voxels that their codes name.
template <typename T>
inline typename Vector<T>::type load_passed(const T* gradients, const uint8_t* codes) {
    using vector = typename Vector<T>::type;
    return widen<T>(codes) == kNoVoxel ? vector{} : Vector<T>::load(gradients);
}

// The first `count` of them, the rest zero.
template <typename T>
inline typename Vector<T>::type load_passed_partial(const T* gradients, const uint8_t* codes, int64_t count) {
    T values[Vector<T>::lanes] = {};
    uint8_t chosen[Vector<T>::lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
        values[i] = gradients[i];
        chosen[i] = codes[i];
    }
    return load_passed(values, chosen);
}

// sums[c] for `voxels` voxels of `channels` channels each.
template <typename T>
void sum_chosen_channels_last(const T* gradients, const uint8_t* codes, int64_t voxels, int64_t channels, T* sums) {
    using V = Vector<T>;
    for (int64_t c = 0; c < channels; c += V::lanes) {
        typename V::type sum = {};
        if (channels < V::lanes) {
            for (int64_t v = 0; v < voxels; ++v) {
                sum += load_passed_partial(gradients + v * channels, codes + v * channels, channels);
            }
            V::store_partial(sums, sum, channels);
        } else {
            const int64_t first = smaller(c, channels - V::lanes);
            for (int64_t v = 0; v < voxels; ++v) {
                sum += load_passed(gradients + v * channels + first, codes + v * channels + first);
            }
            V::store(sums + first, sum);
        }
    }
}

template <typename T>
T sum_chosen_run(const T* gradients, const uint8_t* codes, int64_t voxels) {
    using V = Vector<T>;
    typename V::type sum = {};
    int64_t v = 0;
    for (; v + V::lanes <= voxels; v += V::lanes) sum += load_passed(gradients + v, codes + v);
    sum += load_passed_partial(gradients + v, codes + v, voxels - v);
    T total = 0;
    for (int i = 0; i < V::lanes; ++i) total += sum[i];
    return total;
}

template <typename T>
void sum_chosen(const PooledProblem& problem, const T* grad_pooled, const uint8_t* code, T* grad_bias) {
    const int64_t channels = problem.conv.out_channels, depths = problem.pooled_size[0];
    const int64_t plane = problem.pooled_size[1] * problem.pooled_size[2];
    const VolumeStrides strides = volume_strides(problem.conv.layout, channels, problem.pooled_size);
    const int64_t parts = problem.conv.batch * depths;
    T* partials = scratch<T>(Scratch::shared_partials, parts * channels);
    parallel_for(parts, [&](int64_t part) {
        const int64_t first = part / depths * strides.sample + part % depths * strides.axis[0];
        T* sums = partials + part * channels;
        if (problem.conv.layout == Layout::ndhwc) {
            sum_chosen_channels_last(grad_pooled + first, code + first, plane, channels, sums);
            return;
        }
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t at = first + c * strides.channel;
            sums[c] = sum_chosen_run(grad_pooled + at, code + at, plane);
        }
    });
    for (int64_t c = 0; c < channels; ++c) {
        T total = 0;
        for (int64_t part = 0; part < parts; ++part) total += partials[part * channels + c];
        grad_bias[c] = total;
    }
}

}  // namespace
}  // namespace pvc
