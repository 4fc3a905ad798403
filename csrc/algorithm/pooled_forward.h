// Convolution, activation and max-pool in one pass: the convolution's result never leaves the cache.
//
// A task is a tile of pooled voxels of one sample. Its source is packed as for any gather (compute_tile.h); then, slab
// by slab, the microkernels compute the output voxels under a few pooled rows into scratch memory and max_pool.h
// reduces them. A slab is one or a few rows of windows and stays in L1; where windows overlap, or where the reduction
// takes more than one chunk of channels, it is the whole tile. Neighbouring tiles compute what overlapping windows
// share again.
#pragma once

#include "direct_gather.h"
#include "pool_store.h"

namespace pvc {
namespace {

template <typename T>
class PooledTileTask {
  public:
    PooledTileTask(const PooledProblem& problem, const Gather& gather, const Blocking<T>& b,
                   const PooledTarget<T>& target, int64_t task)
        : problem_(problem), gather_(gather), b_(b), target_(target) {
        const Tiling& tiling = b.tiling;
        const PooledTile tile(gather, tiling, task / b.units);
        unit_ = task % b.units;
        sample_ = from_.sample = tile.sample;
        from_.width = b.chunk;
        for (int a = 0; a < 3; ++a) {
            cell_[a] = tile.cell[a];
            cells_[a] = tile.count[a];
            first_[a] = cell_[a] * problem.pool_stride[a] - problem.pool_padding[a];
            from_.origin[a] = tile.origin[a];
        }
        input_ = scratch<T>(Scratch::tile_input, tiling.packed_voxels() * b.chunk + b.lanes);
        choose_slab();
    }

    void run(const T* source, const T* packed_weights, const T* initial) {
        const int64_t all_sources = gather_.groups * gather_.source_channels;
        for (int64_t chunk = 0; chunk < b_.chunks; ++chunk) {
            from_.channel = unit_ * b_.unit_sources + chunk * b_.chunk;
            from_.channels =
                smaller(smaller(b_.chunk, b_.unit_sources - chunk * b_.chunk), all_sources - from_.channel);
            pack_source(gather_, b_.tiling.axis, planar(), from_, source, input_);
            for (int64_t d = 0; d < cells_[0]; d += slab_[0]) {
                for (int64_t h = 0; h < cells_[1]; h += slab_[1]) {
                    begin_slab(d, h);
                    for (int64_t block = 0; block < b_.blocks; ++block) {
                        compute_block(chunk, block, packed_weights + unit_ * b_.unit_weights(),
                                      initial + unit_ * b_.unit_width());
                    }
                }
            }
        }
    }

  private:
    bool planar() const { return b_.kernel == Kernel::planar; }

    // Output positions under `count` windows from `cell` on.
    WindowPart part(int axis, int64_t cell, int64_t count) const {
        const WindowPart first = window_part(problem_, axis, cell),
                         last = window_part(problem_, axis, cell + count - 1);
        return {first.origin, first.begin, last.end};
    }

    void choose_slab() {
        constexpr int64_t kSlabBytes = kL1Bytes / 2;
        const int64_t block_values = ceil_divide(b_.grains, b_.blocks) * b_.grain;
        slab_part_[2] = part(2, cell_[2], cells_[2]);
        const int64_t width = slab_part_[2].size();
        const int64_t row_bytes =
            problem_.pool_window[0] * problem_.pool_window[1] * width * block_values * static_cast<int64_t>(sizeof(T));
        slab_[0] = cells_[0];
        slab_[1] = cells_[1];
        if (b_.slabs) {
            slab_[0] = 1;
            const bool apart = problem_.pool_stride[1] >= problem_.pool_window[1];
            if (apart) slab_[1] = larger(smaller(kSlabBytes / row_bytes, cells_[1]), 1);
        }
        int64_t rows = problem_.pool_stride[0] * (slab_[0] - 1) + problem_.pool_window[0];
        rows *= problem_.pool_stride[1] * (slab_[1] - 1) + problem_.pool_window[1];
        pitch_ = planar() ? larger(width, b_.lanes) : width;
        const int64_t items = rows * ceil_divide(pitch_, b_.item_voxels());
        sums_ = scratch<T>(Scratch::tile_accumulators, items * b_.grains * b_.lanes);
        places_ = static_cast<int64_t*>(
            scratch_bytes(Scratch::tile_output, static_cast<size_t>(items) * (sizeof(int64_t) + sizeof(int32_t))));
        offsets_ = reinterpret_cast<int32_t*>(places_ + items);
        // The planar kernel's rows.
        const int64_t planes = planar() ? rows * pitch_ * block_values + 2 * b_.lanes : 0;
        planes_ = scratch<T>(Scratch::tile_rows, planes);
    }

    void begin_slab(int64_t d, int64_t h) {
        slab_cell_[0] = d;
        slab_cell_[1] = h;
        const int64_t voxels[2] = {slab_part_[0].size(), slab_part_[1].size()};
        slab_source_ = 0;
        for (int a = 0; a < 3; ++a) {
            if (a < 2) {
                slab_cells_[a] = smaller(slab_[a], cells_[a] - slab_cell_[a]);
                slab_part_[a] = part(a, cell_[a] + slab_cell_[a], slab_cells_[a]);
            }
            slab_source_ += (slab_part_[a].begin - first_[a]) * b_.tiling.axis[a].voxel_step * b_.axis_stride(a);
        }
        if (slab_part_[0].size() != voxels[0] || slab_part_[1].size() != voxels[1]) list_items();
    }

    // Where each item of the slab reads and, in the planes of the planar kernel, writes: the same for slabs of one
    // size.
    void list_items() {
        int64_t step[3];
        for (int a = 0; a < 3; ++a) step[a] = b_.tiling.axis[a].voxel_step * b_.axis_stride(a);
        const int64_t width = slab_part_[2].size();
        items_ = 0;
        for (int64_t d = 0; d < slab_part_[0].size(); ++d) {
            for (int64_t h = 0; h < slab_part_[1].size(); ++h) {
                const int64_t row = d * slab_part_[1].size() + h;
                for (int64_t w = 0; w < width; w += b_.item_voxels(), ++items_) {
                    const int64_t begin = vector_begin(w, width, b_.item_voxels());
                    offsets_[items_] = static_cast<int32_t>(d * step[0] + h * step[1] + begin * step[2]);
                    places_[items_] = row * pitch_ + begin;
                }
            }
        }
        plane_ = slab_part_[0].size() * slab_part_[1].size() * pitch_;
    }

    void compute_block(int64_t chunk, int64_t block, const T* weights, const T* initial) {
        const int64_t grains = b_.block_grains(block), channel = b_.block_first(block) * b_.grain;
        const int64_t width = grains * b_.grain, all_targets = gather_.groups * gather_.target_channels;
        const int64_t target_channel = unit_ * b_.unit_targets + channel;
        const int64_t channels = smaller(smaller(width, b_.unit_targets - channel), all_targets - target_channel);
        if (channels <= 0) return;  // the last unit of a depthwise problem has fewer channels

        TileArguments<T> arguments = {};
        arguments.source = input_ + slab_source_ + (b_.kernel == Kernel::depthwise ? channel : 0);
        arguments.items = offsets_;
        arguments.places = places_;
        arguments.sums = b_.chunks == 1 ? sums_ : sums_ + items_ * b_.block_first(block) * b_.lanes;
        arguments.channel_stride = plane_;
        const T* block_weights = weights + b_.block_weights(block) + chunk * b_.elements * width;
        for (int64_t p = 0; p < b_.part_count; ++p) {
            const bool last = chunk + 1 == b_.chunks && p + 1 == b_.part_count;
            arguments.segments = b_.segments + b_.parts[p].segment;
            arguments.segment_count = b_.parts[p].segments;
            arguments.weights = block_weights + b_.parts[p].element * width;
            arguments.initial = chunk == 0 && p == 0 ? initial + channel : nullptr;
            arguments.target = last && planar() ? planes_ : nullptr;
            compute_part(b_, grains, items_, arguments);
        }
        if (chunk + 1 < b_.chunks) return;
        PoolRow<T> row;
        row.values = planar() ? planes_ : arguments.sums;
        for (int a = 0; a < 3; ++a) row.first[a] = slab_part_[a].begin;
        row.stride[2] = planar() ? 1 : width;
        row.stride[1] = pitch_ * row.stride[2];
        row.stride[0] = slab_part_[1].size() * row.stride[1];
        row.channel = plane_;
        row.cell = cell_[2];
        row.cells = cells_[2];
        for (int64_t d = 0; d < slab_cells_[0]; ++d) {
            for (int64_t h = 0; h < slab_cells_[1]; ++h) {
                row.depth = window_part(problem_, 0, cell_[0] + slab_cell_[0] + d);
                row.height = window_part(problem_, 1, cell_[1] + slab_cell_[1] + h);
                const int64_t cell[3] = {cell_[0] + slab_cell_[0] + d, cell_[1] + slab_cell_[1] + h, cell_[2]};
                pool_row(problem_, target_, planar(), sample_, cell, target_channel, channels, row);
            }
        }
    }

    const PooledProblem& problem_;
    const Gather& gather_;
    const Blocking<T>& b_;
    const PooledTarget<T>& target_;
    int64_t unit_, sample_;
    int64_t cell_[3], cells_[3];  // windows of the tile
    int64_t first_[3];            // output position of the tile's first window
    int64_t slab_[2];             // windows of a slab
    int64_t slab_cell_[2], slab_cells_[2];
    WindowPart slab_part_[3] = {};
    int64_t slab_source_;            // where its first voxel reads
    int64_t items_, pitch_, plane_;  // elements of a row and of a channel in the planar kernel's planes
    SourceBlock from_ = {};
    T* input_;
    T* sums_;
    T* planes_;
    int64_t* places_;
    int32_t* offsets_;
};

template <typename T>
void pooled_forward(const PooledProblem& problem, const T* x, const T* weight, const T* bias, T* pooled,
                    uint8_t* code) {
    const Gather gather = gather_windows(problem);
    const PackedWeights<T> packed(gather, choose_blocking<T>(gather), weight, bias);
    const Blocking<T>& b = packed.blocking;
    const PooledTarget<T> target = {
        pooled, code, volume_strides(problem.conv.layout, problem.conv.out_channels, problem.pooled_size)};
    parallel_for(gather.batch * b.tiling.count() * b.units, [&](int64_t task) {
        PooledTileTask<T>(problem, gather, b, target, task).run(x, packed.weights, packed.initial);
    });
}

}  // namespace
}  // namespace pvc
