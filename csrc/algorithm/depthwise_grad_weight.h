// The weight gradient of a depthwise convolution in ndhwc without packing: the walk of depthwise_gather.h, with the
// gradients of the targets in registers. Every task adds to sums of its own, which are added in the order of the tasks.
#pragma once

#include "depthwise_gather.h"

namespace pvc {
namespace {

template <typename T>
bool is_depthwise_grad_weight(const Gather& gather) {
    return is_depthwise<T>(gather) && walks_rows(gather);
}

template <typename T>
void depthwise_grad_weight(const Gather& gather, const T* grad_output, const T* x, T* grad_weight) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const DepthwiseWalk<T> walk(gather, DepthwisePass::grad_weight);
    const int64_t size = walk.blocks * walk.taps * lanes, tasks = walk.tasks();
    T* partials = scratch<T>(Scratch::shared_partials, tasks * size);
    parallel_for(tasks, [&](int64_t task) {
        T* sums = partials + task * size;
        std::memset(sums, 0, static_cast<size_t>(size) * sizeof(T));
        // A walk writes targets in the other passes; the kernel of this one only reads them.
        walk.run(task, x, const_cast<T*>(grad_output), RowsInPlace<T>(),
                 [&](DepthwiseTile<T>& tile, int64_t block, DepthwiseKernel<T> kernel) {
                     tile.sums = sums + block * walk.taps * lanes;
                     kernel(tile);
                 });
    });
    for (int64_t task = 1; task < tasks; ++task) {
        for (int64_t i = 0; i < size; ++i) partials[i] += partials[task * size + i];
    }
    const GatherAxis* axis = gather.axis;
    for (int64_t block = 0; block < walk.blocks; ++block) {
        T* to = grad_weight + walk.first_channel(block) * gather.weight_group_stride;
        const T* from = partials + block * walk.taps * lanes;
        for (int64_t tap = 0; tap < walk.taps; ++tap) {
            const int64_t d = tap / (axis[1].taps * axis[2].taps), h = tap / axis[2].taps % axis[1].taps;
            const int64_t place = d * gather.weight_tap_stride[0] + h * gather.weight_tap_stride[1] +
                                  tap % axis[2].taps * gather.weight_tap_stride[2];
            for (int64_t i = 0; i < lanes; ++i) to[place + i * gather.weight_group_stride] = from[tap * lanes + i];
        }
    }
}

}  // namespace
}  // namespace pvc
