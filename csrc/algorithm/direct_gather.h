// Direct convolution, one gather at a time: pack the weights, then compute tile after tile in parallel.
//
// For each tile and chunk of source channels: copy the source into scratch (pack_source), then for each block of target
// channels let the weights of one part of the reduction stay in L1 while a microkernel passes over the tile
// (compute_tile). Every target value is written by one task, its products added in an order that the problem alone
// decides.
#pragma once

#include "../parallel.h"
#include "compute_tile.h"
#include "depthwise_gather.h"
#include "pack_weight.h"

namespace pvc {
namespace {

// The weights of all units in the order of the kernels and, per unit, what its sums start from: `bias` (one value per
// target channel of all groups) or, when it is null, zero.
template <typename T>
struct PackedWeights {
    const Blocking<T> blocking;
    T* weights;
    T* initial;

    PackedWeights(const Gather& gather, const Blocking<T>& b, const T* weight, const T* bias) : blocking(b) {
        const int64_t weight_values = b.units * b.unit_weights(), width = b.unit_width();
        weights = scratch<T>(Scratch::shared_weights, weight_values + b.units * width);
        initial = weights + weight_values;
        constexpr int64_t kParallelPack = 1 << 15;  // values; less is quicker than waking a thread
        const auto pack = [&](int64_t task) {
            pack_weight_block(gather, b, task / b.blocks, task % b.blocks, weight, weights);
        };
        if (weight_values >= kParallelPack) {
            parallel_for(b.units * b.blocks, pack);
        } else {
            for (int64_t task = 0; task < b.units * b.blocks; ++task) pack(task);
        }
        const int64_t all_targets = gather.groups * gather.target_channels;
        for (int64_t unit = 0; unit < b.units; ++unit) {
            for (int64_t c = 0; c < width; ++c) {
                const int64_t channel = unit * b.unit_targets + c;
                const bool exists = bias != nullptr && c < b.unit_targets && channel < all_targets;
                initial[unit * width + c] = exists ? bias[channel] : 0;
            }
        }
    }
};

// Computes every target voxel of the gather; `bias` (one value per target channel of all groups) may be null.
template <typename T>
void direct_gather(const Gather& gather, const T* source, const T* weight, const T* bias, T* target) {
    if (is_depthwise<T>(gather)) {
        depthwise_gather(gather, source, weight, bias, target);
        return;
    }
    const PackedWeights<T> packed(gather, choose_blocking<T>(gather), weight, bias);
    const Blocking<T>& b = packed.blocking;
    parallel_for(gather.batch * b.tiling.count() * b.units, [&](int64_t task) {
        TileTask<T>(gather, b, task).run(source, packed.weights, packed.initial, target);
    });
}

}  // namespace
}  // namespace pvc
