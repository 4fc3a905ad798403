// One task: one tile of target voxels of one sample, all target channels of one unit.
#pragma once

#include "blocking.h"
#include "pack_source.h"
#include "store_target.h"

namespace pvc {
namespace {

template <typename T, int NR>
Microkernel<T> microkernel_of(const Blocking<T>& b, int64_t items) {
    if constexpr (!is_pair<T>) {
        if (b.kernel == Kernel::planar) return planar_tile_of<T, NR>(items);
    }
    if constexpr (NR <= kBroadcastVectors) {
        if constexpr (!is_pair<T>) {
            if (b.kernel == Kernel::depthwise) return depthwise_tile_of<T, NR>(items);
        }
        if (b.length == 3) return broadcast_tile_of<T, NR, 3>(items);
        return b.length == 1 ? broadcast_tile_of<T, NR, 1>(items) : broadcast_tile_of<T, NR, 0>(items);
    }
    return nullptr;
}

template <typename T>
Microkernel<T> microkernel(const Blocking<T>& b, int64_t grains, int64_t items) {
    if (grains == 1) return microkernel_of<T, 1>(b, items);
    if (grains == 2) return microkernel_of<T, 2>(b, items);
    if (grains == 3) return microkernel_of<T, 3>(b, items);
    return microkernel_of<T, 4>(b, items);
}

// Passes all `items` of a tile over one part of the reduction; `arguments` are those of the first item. On the way the
// weights that follow are asked for: where they are many, every tile reads them from beyond its core's caches.
template <typename T>
void compute_part(const Blocking<T>& b, int64_t grains, int64_t items, TileArguments<T> arguments,
                  int64_t weights = 0) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t full = b.full_tile(grains), each = ceil_divide(weights * full, items * kLine) * kLine;
    const T *ahead = arguments.weights + weights, *end = ahead + weights;
    const auto run = [&](Microkernel<T> tile, int64_t count) {
        for (const T* stop = end - ahead < each ? end : ahead + each; ahead < stop; ahead += kLine) {
            __builtin_prefetch(ahead, 0, 2);
        }
        tile(arguments);
        arguments.items += count;
        arguments.places += count;
        arguments.sums += count * grains * b.lanes;
        items -= count;
    };
    const Microkernel<T> full_tile = microkernel<T>(b, grains, full);
    while (items >= 2 * full || items == full) run(full_tile, full);
    // What is left is shared by two tiles when one is not enough: a tile of few items cannot hide the FMA latency.
    while (items > 0) {
        const int64_t now = items > full ? ceil_divide(items, 2) : items;
        run(microkernel<T>(b, grains, now), now);
    }
}

// S: what source and target hold.
template <typename T, typename S = T>
class TileTask {
  public:
    TileTask(const Gather& gather, const Blocking<T>& b, int64_t task) : gather_(gather), b_(b) {
        const Tiling& tiling = b.tiling;
        unit_ = task % b.units;
        const int64_t tile = task / b.units % tiling.count();
        to_.sample = from_.sample = task / b.units / tiling.count();
        from_.width = b.chunk;
        const int64_t index[3] = {tile / tiling.tiles[2] / tiling.tiles[1], tile / tiling.tiles[2] % tiling.tiles[1],
                                  tile % tiling.tiles[2]};
        for (int axis = 0; axis < 3; ++axis) {
            to_.first[axis] = index[axis] * tiling.axis[axis].tile;
            to_.count[axis] = smaller(tiling.axis[axis].tile, gather.axis[axis].count - to_.first[axis]);
            from_.origin[axis] = gather.axis[axis].source_start + to_.first[axis] * gather.axis[axis].source_step;
        }
        items_ = b.items(to_.count);
        // A vector of the planar kernel may be longer than what is left of the last row.
        input_ = scratch<T>(Scratch::tile_input, tiling.packed_voxels() * b.chunk + b.lanes);
        sums_ = scratch<Sum<T>>(Scratch::tile_accumulators, items_ * b.grains * b.lanes);
        places_ = static_cast<int64_t*>(
            scratch_bytes(Scratch::tile_output, static_cast<size_t>(items_) * (sizeof(int64_t) + sizeof(int32_t))));
        offsets_ = reinterpret_cast<int32_t*>(places_ + items_);
        list_items();
    }

    void run(const S* source, const T* packed_weights, const Sum<T>* initial, S* target) {
        const int64_t all_sources = gather_.groups * gather_.source_channels;
        for (int64_t chunk = 0; chunk < b_.chunks; ++chunk) {
            from_.channel = unit_ * b_.unit_sources + chunk * b_.chunk;
            from_.channels =
                smaller(smaller(b_.chunk, b_.unit_sources - chunk * b_.chunk), all_sources - from_.channel);
            if (b_.elements > 0) {
                pack_source(gather_, b_.tiling.axis, b_.kernel == Kernel::planar, from_, source, input_);
            }
            for (int64_t block = 0; block < b_.blocks; ++block) {
                compute_block(chunk, block, packed_weights + unit_ * b_.unit_weights(),
                              initial + unit_ * b_.unit_width(), target);
            }
        }
        Vector<T>::finish_stream();
    }

  private:
    // Where each item reads in scratch memory and, relative to the tile's first voxel, writes in the target.
    void list_items() {
        const GatherAxis* axis = gather_.axis;
        const int64_t voxel = gather_.layout == Layout::ndhwc ? gather_.groups * gather_.target_channels : 1;
        const int64_t place_w = axis[2].target_step * voxel;
        const int64_t place_h = axis[1].target_step * axis[2].target_size * voxel;
        const int64_t place_d = axis[0].target_step * axis[1].target_size * axis[2].target_size * voxel;
        int64_t step[3];
        for (int a = 0; a < 3; ++a) step[a] = b_.tiling.axis[a].voxel_step * b_.axis_stride(a);
        int64_t item = 0;
        for (int64_t d = 0; d < to_.count[0]; ++d) {
            for (int64_t h = 0; h < to_.count[1]; ++h) {
                for (int64_t w = 0; w < to_.count[2]; w += b_.item_voxels(), ++item) {
                    const int64_t begin = vector_begin(w, to_.count[2], b_.item_voxels());
                    offsets_[item] = static_cast<int32_t>(d * step[0] + h * step[1] + begin * step[2]);
                    places_[item] = d * place_d + h * place_h + begin * place_w;
                }
            }
        }
    }

    // Whether a kernel can write its sums to the target itself.
    bool direct() const {
        if constexpr (is_pair<T>) return false;
        const int64_t all_targets = gather_.groups * gather_.target_channels;
        const bool last = gather_.layout == Layout::ndhwc;
        if (b_.kernel != Kernel::planar) return last && to_.channels == to_.width;
        return (!last || all_targets == 1) && gather_.axis[2].target_step == 1 && to_.count[2] >= b_.lanes;
    }

    // Whether the target is too large to stay in a cache, and a block writes whole cache lines of it.
    bool streams(const S* target) const {
        constexpr int64_t kLargeBytes = int64_t{64} << 20, kLine = 64;
        const GatherAxis* axis = gather_.axis;
        const int64_t voxel_bytes = gather_.groups * gather_.target_channels * static_cast<int64_t>(sizeof(T));
        const int64_t voxels = axis[0].target_size * axis[1].target_size * axis[2].target_size;
        const int64_t block_bytes = to_.width * static_cast<int64_t>(sizeof(T));
        const int64_t begin = reinterpret_cast<intptr_t>(target) + to_.channel * static_cast<int64_t>(sizeof(T));
        return b_.kernel != Kernel::planar && gather_.batch * voxels * voxel_bytes >= kLargeBytes &&
               voxel_bytes % kLine == 0 && block_bytes % kLine == 0 && begin % kLine == 0;
    }

    S* tile_target(S* target) const {
        const GatherAxis* axis = gather_.axis;
        const int64_t all_targets = gather_.groups * gather_.target_channels;
        int64_t voxel = 0, voxels = 1;
        for (int a = 0; a < 3; ++a) {
            voxel = voxel * axis[a].target_size + axis[a].target_first + to_.first[a] * axis[a].target_step;
            voxels *= axis[a].target_size;
        }
        const bool last = gather_.layout == Layout::ndhwc;
        return target + to_.sample * all_targets * voxels + voxel * (last ? all_targets : 1) +
               to_.channel * (last ? 1 : voxels);
    }

    void compute_block(int64_t chunk, int64_t block, const T* weights, const Sum<T>* initial, S* target) {
        const int64_t grains = b_.block_grains(block), channel = b_.block_first(block) * b_.grain;
        const int64_t all_targets = gather_.groups * gather_.target_channels;
        to_.channel = unit_ * b_.unit_targets + channel;
        to_.width = grains * b_.grain;
        to_.channels = smaller(smaller(to_.width, b_.unit_targets - channel), all_targets - to_.channel);
        if (to_.channels <= 0) return;  // the last unit of a depthwise problem has fewer channels

        TileArguments<T> arguments = {};
        arguments.source = input_ + (b_.kernel == Kernel::depthwise ? channel : 0);
        arguments.items = offsets_;
        arguments.places = places_;
        arguments.sums = b_.chunks == 1 ? sums_ : sums_ + items_ * b_.block_first(block) * b_.lanes;
        arguments.channel_stride =
            gather_.axis[0].target_size * gather_.axis[1].target_size * gather_.axis[2].target_size;
        const T* block_weights = weights + b_.block_weights(block) + chunk * b_.elements * to_.width;
        for (int64_t p = 0; p < b_.part_count; ++p) {
            const bool last = chunk + 1 == b_.chunks && p + 1 == b_.part_count;
            arguments.segments = b_.segments + b_.parts[p].segment;
            arguments.segment_count = b_.parts[p].segments;
            arguments.weights = block_weights + b_.parts[p].element * to_.width;
            arguments.initial = chunk == 0 && p == 0 ? initial + channel : nullptr;
            if constexpr (!is_pair<T>) {
                arguments.target = last && direct() ? tile_target(target) : nullptr;
                arguments.stream = arguments.target != nullptr && streams(target);
            }
            const int64_t next = p + 1 < b_.part_count ? b_.parts[p + 1].element : b_.elements;
            const bool follow = p + 1 < b_.part_count || (b_.chunks == 1 && block + 1 < b_.blocks);
            compute_part(b_, grains, items_, arguments, follow ? (next - b_.parts[p].element) * to_.width : 0);
        }
        if (chunk + 1 < b_.chunks || direct()) return;
        if constexpr (!is_pair<T>) {
            if (b_.kernel == Kernel::planar) {
                store_planar(gather_, to_, arguments.sums, target);
                return;
            }
        }
        store_channels_last(gather_, to_, arguments.sums, target);
    }

    const Gather& gather_;
    const Blocking<T>& b_;
    int64_t unit_, items_;
    SourceBlock from_ = {};
    TargetBlock to_ = {};
    T* input_;
    Sum<T>* sums_;
    int64_t* places_;
    int32_t* offsets_;
};

}  // namespace
}  // namespace pvc
