// Weights in the order in which a microkernel reads them: for every element of the reduction one row of `width` target
// channels, zero beyond the last one. Elements go tap by tap with source channels innermost, or for the planar kernel
// channel by channel with taps innermost.
#pragma once

#include "blocking.h"

namespace pvc {
namespace {

// The rows of all taps for `sources` source channels, of which the first `existing` exist.
template <typename T>
T* pack_taps(const Gather& gather, const T* weight, int64_t existing, int64_t sources, int64_t targets, int64_t width,
             T* packed) {
    const GatherAxis* axis = gather.axis;
    int64_t tap[3], index[3];
    for (tap[0] = 0; tap[0] < axis[0].taps; ++tap[0]) {
        for (tap[1] = 0; tap[1] < axis[1].taps; ++tap[1]) {
            for (tap[2] = 0; tap[2] < axis[2].taps; ++tap[2]) {
                const T* from = weight;
                for (int a = 0; a < 3; ++a) {
                    index[a] = axis[a].weight_first + tap[a] * axis[a].weight_step;
                    from += index[a] * gather.weight_tap_stride[a];
                }
                for (int64_t c = 0; c < sources; ++c, packed += width) {
                    const int64_t count = c < existing ? targets : 0;
                    for (int64_t o = 0; o < count; ++o) {
                        packed[o] = from[c * gather.weight_source_stride + o * gather.weight_target_stride];
                    }
                    for (int64_t o = count; o < width; ++o) packed[o] = 0;
                }
            }
        }
    }
    return packed;
}

// One block of one unit: all its chunks. `packed` is the start of all packed weights.
template <typename T>
void pack_weight_block(const Gather& gather, const Blocking<T>& b, int64_t unit, int64_t block, const T* weight,
                       T* packed) {
    const int64_t channel = b.block_first(block) * b.grain, width = b.block_grains(block) * b.grain;
    int64_t targets = smaller(width, b.unit_targets - channel);
    T* to = packed + unit * b.unit_weights() + b.block_weights(block);
    if (b.kernel == Kernel::depthwise) {  // each target channel is a group
        Gather by_group = gather;
        by_group.weight_target_stride = gather.weight_group_stride;
        const int64_t first = unit * b.unit_targets + channel;
        targets = larger(smaller(targets, gather.groups - first), 0);
        pack_taps(by_group, weight + first * gather.weight_group_stride, 1, 1, targets, width, to);
        return;
    }
    const T* from = weight + unit * gather.weight_group_stride + channel * gather.weight_target_stride;
    const int64_t together = b.kernel == Kernel::planar ? 1 : b.chunk;  // source channels per pass over the taps
    for (int64_t first = 0; first < b.chunks * b.chunk; first += together) {
        const int64_t existing = larger(smaller(together, b.unit_sources - first), 0);
        to = pack_taps(gather, from + first * gather.weight_source_stride, existing, together, targets, width, to);
    }
}

}  // namespace
}  // namespace pvc
