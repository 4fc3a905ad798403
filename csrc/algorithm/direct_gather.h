// Direct convolution, one gather at a time: pack the weights, then compute tile after tile in parallel.
//
// For each tile and chunk of source channels: copy the source channels-last into scratch (pack_source), then for each
// block of target channels let the weights of one part of the reduction stay in L1 while a microkernel passes over all
// voxels of the tile; sums wait in a small buffer between parts and go to the target when complete (store_target).
// Every target value is written by one task, its products added in an order that the problem alone decides.
#pragma once

#include "../parallel.h"
#include "blocking.h"
#include "pack_source.h"
#include "pack_weight.h"
#include "store_target.h"

namespace pvc {
namespace {

template <typename T, int NR>
Microkernel<T> microkernel_of(const Blocking<T>& b, int64_t voxels) {
    if (b.depthwise) return depthwise_tile_of<T, NR>(voxels);
    return b.flat ? broadcast_tile_of<T, NR, true>(voxels) : broadcast_tile_of<T, NR, false>(voxels);
}

template <typename T>
Microkernel<T> microkernel(const Blocking<T>& b, int64_t vectors, int64_t voxels) {
    if (vectors == 1) return microkernel_of<T, 1>(b, voxels);
    if (vectors == 2) return microkernel_of<T, 2>(b, voxels);
    return microkernel_of<T, 3>(b, voxels);
}

// Passes all `voxels` of a tile over one part of the reduction.
template <typename T>
void compute_part(const Blocking<T>& b, int64_t vectors, const Part& part, const T* source,
                  const int32_t* voxel_offsets, int64_t voxels, const T* weights, const T* initial, T* sums) {
    const int64_t full = b.depthwise ? kDepthwiseVoxels : tile_voxels(static_cast<int>(vectors));
    const int64_t width = vectors * Vector<T>::lanes;
    const Segment* segments = b.segments + part.segment;
    const Microkernel<T> full_tile = microkernel<T>(b, vectors, full);
    int64_t voxel = 0;
    for (; voxels - voxel >= 2 * full || voxels - voxel == full; voxel += full) {
        full_tile(source, voxel_offsets + voxel, segments, part.segments, weights, initial, sums + voxel * width);
    }
    // What is left is shared by two tiles when one is not enough: a tile of few voxels cannot hide the FMA latency.
    while (voxel < voxels) {
        const int64_t left = voxels - voxel, now = left > full ? ceil_divide(left, 2) : left;
        microkernel<T>(b, vectors, now)(source, voxel_offsets + voxel, segments, part.segments, weights, initial,
                                        sums + voxel * width);
        voxel += now;
    }
}

template <typename T>
void compute_tile(const Gather& gather, const Blocking<T>& b, int64_t task, const T* source, const T* packed_weights,
                  const T* initial, T* target) {
    const Tiling& tiling = b.tiling;
    const int64_t unit = task % b.units, tile = task / b.units % tiling.count();
    TargetBlock to = {};
    to.sample = task / b.units / tiling.count();
    const int64_t index[3] = {tile / tiling.tiles[2] / tiling.tiles[1], tile / tiling.tiles[2] % tiling.tiles[1],
                              tile % tiling.tiles[2]};
    SourceBlock from = {};
    from.sample = to.sample;
    from.width = b.chunk;
    for (int axis = 0; axis < 3; ++axis) {
        to.first[axis] = index[axis] * tiling.axis[axis].tile;
        to.count[axis] = smaller(tiling.axis[axis].tile, gather.axis[axis].count - to.first[axis]);
        from.origin[axis] = gather.axis[axis].source_start + to.first[axis] * gather.axis[axis].source_step;
    }
    const int64_t voxels = to.count[0] * to.count[1] * to.count[2];
    const PackedAxis* packed = tiling.axis;

    const int64_t packed_values = tiling.packed_voxels() * b.chunk;
    T* input = scratch<T>(Scratch::tile_input, packed_values + 1);
    T* sums = scratch<T>(Scratch::tile_accumulators, tiling.voxels() * b.vectors * b.lanes);
    int32_t* voxel_offsets = scratch<int32_t>(Scratch::tile_output, tiling.voxels());
    const int64_t step_w = packed[2].voxel_step * b.chunk;
    const int64_t step_h = packed[1].voxel_step * packed[2].rows * b.chunk;
    const int64_t step_d = packed[0].voxel_step * packed[1].rows * packed[2].rows * b.chunk;
    int32_t* next_offset = voxel_offsets;
    for (int64_t d = 0; d < to.count[0]; ++d) {
        for (int64_t h = 0; h < to.count[1]; ++h) {
            for (int64_t w = 0; w < to.count[2]; ++w) {
                *next_offset++ = static_cast<int32_t>(d * step_d + h * step_h + w * step_w);
            }
        }
    }

    const int64_t all_sources = gather.groups * gather.source_channels;
    const int64_t all_targets = gather.groups * gather.target_channels;
    for (int64_t chunk = 0; chunk < b.chunks; ++chunk) {
        from.channel = b.source_channel(unit) + chunk * b.chunk;
        from.channels = smaller(smaller(b.chunk, b.unit_sources - chunk * b.chunk), all_sources - from.channel);
        if (packed_values > 0) pack_source(gather, packed, from, source, input);
        for (int64_t block = 0; block < b.blocks; ++block) {
            const int64_t vectors = b.block_vectors(block), channel = b.block_first(block) * b.lanes;
            const T* weights = packed_weights + unit * b.unit_weights() + b.block_weights(block) +
                               chunk * b.elements * vectors * b.lanes;
            T* block_sums = b.chunks == 1 ? sums : sums + channel * tiling.voxels();
            for (int64_t p = 0; p < b.part_count; ++p) {
                const bool first = chunk == 0 && p == 0;
                compute_part(b, vectors, b.parts[p], input + (b.depthwise ? channel : 0), voxel_offsets, voxels,
                             weights + b.parts[p].element * vectors * b.lanes,
                             first ? initial + unit * b.vectors * b.lanes + channel : nullptr, block_sums);
            }
            if (chunk + 1 < b.chunks) continue;
            to.channel = b.target_channel(unit) + channel;
            to.width = vectors * b.lanes;
            to.channels = smaller(smaller(to.width, b.unit_targets - channel), all_targets - to.channel);
            if (to.channels > 0) store_target(gather, to, block_sums, target);
        }
    }
}

// Packs one block of one unit: all its chunks.
template <typename T>
void pack_block(const Gather& gather, const Blocking<T>& b, int64_t unit, int64_t block, const T* weight, T* packed) {
    const int64_t channel = b.block_first(block) * b.lanes, width = b.block_vectors(block) * b.lanes;
    T* to = packed + unit * b.unit_weights() + b.block_weights(block);
    if (b.depthwise) {  // a channel's weights are those of its group
        Gather rows = gather;
        rows.weight_target_stride = gather.weight_group_stride;
        const int64_t first = b.target_channel(unit) + channel;
        const int64_t count = larger(smaller(smaller(width, b.unit_targets - channel), gather.groups - first), 0);
        pack_weight_block(rows, weight + first * gather.weight_group_stride, 1, 1, count, width, to);
        return;
    }
    const T* group = weight + unit * gather.weight_group_stride + channel * gather.weight_target_stride;
    for (int64_t chunk = 0; chunk < b.chunks; ++chunk, to += b.elements * width) {
        const int64_t first = chunk * b.chunk;
        pack_weight_block(gather, group + first * gather.weight_source_stride, smaller(b.chunk, b.unit_sources - first),
                          b.chunk, smaller(width, b.unit_targets - channel), width, to);
    }
}

// Computes every target voxel of the gather; `bias` (one value per target channel of all groups) may be null.
template <typename T>
void direct_gather(const Gather& gather, const T* source, const T* weight, const T* bias, T* target) {
    const Blocking<T> b = choose_blocking<T>(gather);
    const int64_t weight_values = b.units * b.unit_weights(), unit_width = b.vectors * b.lanes;
    T* packed = scratch<T>(Scratch::shared_weights, weight_values + b.units * unit_width);
    T* initial = packed + weight_values;
    constexpr int64_t kParallelPack = 1 << 15;  // values; less is quicker than waking a thread
    const auto pack = [&](int64_t task) { pack_block(gather, b, task / b.blocks, task % b.blocks, weight, packed); };
    if (weight_values >= kParallelPack) {
        parallel_for(b.units * b.blocks, pack);
    } else {
        for (int64_t task = 0; task < b.units * b.blocks; ++task) pack(task);
    }
    const int64_t all_targets = gather.groups * gather.target_channels;
    for (int64_t unit = 0; unit < b.units; ++unit) {
        for (int64_t c = 0; c < unit_width; ++c) {
            const int64_t channel = b.target_channel(unit) + c;
            const bool exists = bias != nullptr && c < b.unit_targets && channel < all_targets;
            initial[unit * unit_width + c] = exists ? bias[channel] : 0;
        }
    }
    parallel_for(gather.batch * b.tiling.count() * b.units,
                 [&](int64_t task) { compute_tile(gather, b, task, source, packed, initial, target); });
}

}  // namespace
}  // namespace pvc
