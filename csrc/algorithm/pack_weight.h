// Weights in the order in which a microkernel reads them: for every element of the reduction (tap by tap, source
// channels innermost) one row of `width` target channels, zero beyond the last one.
#pragma once

#include <cstring>

#include "gather.h"

namespace pvc {
namespace {

// Rows for taps x `rows_per_tap` source channels, of which the first `source_count` exist. `weight` points at the first
// source and target channel wanted; strides are in elements.
template <typename T>
void pack_weight_block(const Gather& gather, const T* weight, int64_t source_count, int64_t rows_per_tap,
                       int64_t target_count, int64_t width, T* packed) {
    const GatherAxis* axis = gather.axis;
    for (int64_t d = 0; d < axis[0].taps; ++d) {
        for (int64_t h = 0; h < axis[1].taps; ++h) {
            for (int64_t w = 0; w < axis[2].taps; ++w) {
                const T* tap = weight + (axis[0].weight_first + d * axis[0].weight_step) * gather.weight_tap_stride[0] +
                               (axis[1].weight_first + h * axis[1].weight_step) * gather.weight_tap_stride[1] +
                               (axis[2].weight_first + w * axis[2].weight_step) * gather.weight_tap_stride[2];
                for (int64_t c = 0; c < rows_per_tap; ++c, packed += width) {
                    const int64_t count = c < source_count ? target_count : 0;
                    for (int64_t o = 0; o < count; ++o) {
                        packed[o] = tap[c * gather.weight_source_stride + o * gather.weight_target_stride];
                    }
                    for (int64_t o = count; o < width; ++o) packed[o] = 0;
                }
            }
        }
    }
}

}  // namespace
}  // namespace pvc
