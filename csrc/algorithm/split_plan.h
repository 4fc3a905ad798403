// How a gather is cut into products of a matrix unit (microkernel/tile_product.h).
//
// The source of a tile of target voxels is packed as for direct convolution (pack_source.h), as [voxel][channel], and
// split into parts. A target voxel's products with the taps of a row are then one run in memory, `taps * channels`
// values long; so are those of its neighbour, some values further on: rows of a left operand that overlap. A run is cut
// into steps of 32 values, of which the last reads what lies behind the run and multiplies it with zeros.
//
// A panel is a set of target voxels whose sources are evenly spaced: a row, or a whole plane, with what lies between
// its rows computed in vain, whichever takes fewer tiles.
#pragma once

#include "../arena.h"
#include "../cache.h"
#include "../microkernel/tile_product.h"
#include "tiling.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

struct SplitPlan {
    static constexpr int64_t kColumns = 32;  // target channels that are computed together

    int parts;
    int64_t chunk, chunks;          // of source channels
    int64_t blocks, blocks_a_task;  // of target channels
    int64_t samples;                // of a task
    Tiling tiling;
    int64_t runs, run, run_steps;  // of a chunk: runs of values, values and steps of a run
    bool joined;                   // a run has all taps along the width
    int32_t* offsets;              // of a chunk's steps
    bool flat;                     // panels are planes
    int64_t pitch;                 // panel rows between neighbours along the height, where panels are planes

    int64_t steps() const { return runs * run_steps; }
    int64_t block_columns(int64_t block, int64_t targets) const {
        return targets - block * kColumns > kTileRows ? kColumns : kTileRows;
    }
    // Of packed weights: [block][chunk][step][part][tile of 16 columns].
    int64_t step_weights(int64_t columns) const { return parts * columns * kTileValues; }
    int64_t block_weights() const { return chunks * steps() * step_weights(kColumns); }

    int64_t panels() const { return tiling.axis[0].tile * (flat ? 1 : tiling.axis[1].tile); }
    int64_t panel_rows(int64_t height, int64_t width) const { return flat ? (height - 1) * pitch + width : width; }
    // Of the sums of a whole task.
    int64_t sums_rows() const {
        const int64_t rows = panel_rows(tiling.axis[1].tile, tiling.axis[2].tile);
        return samples * panels() * ceil_divide(rows, kTileRows) * kTileRows;
    }
    int64_t sample_values() const { return tiling.packed_voxels() * chunk; }
    // Values of one part of a task's source, with those that are read behind the last ones.
    int64_t part_values() const {
        const int64_t behind = kTileRows * tiling.axis[2].voxel_step * chunk + kTileValues;
        return ceil_divide(samples * sample_values() + behind, kTileValues) * kTileValues;
    }
    int64_t tasks(int64_t batch) const {
        return ceil_divide(batch, samples) * tiling.count() * ceil_divide(blocks, blocks_a_task);
    }
    int64_t row_values(int axis) const {
        int64_t values = chunk;
        for (int inner = axis + 1; inner < 3; ++inner) values *= tiling.axis[inner].rows;
        return values;
    }
};

// Chooses `tiling`, `chunk` and what goes with them. Weights beyond a core's cache are read again for each tile, so
// then a task has many voxels, of several samples if need be, and few target channels.
inline void cut_into_tasks(const Gather& gather, SplitPlan& plan) {
    constexpr int64_t kSumBytes = kL2Bytes, kLargeWeights = 6 << 20, kAnySize = int64_t{1} << 40;
    constexpr int64_t kManyVoxels = 1024, kFewBlocks = 4, kFewTasks = 8, kManyTasks = 16;
    const int64_t source_bytes = larger(kL2Bytes, l2_bytes() / 2), value_bytes = plan.parts * 2;
    const int64_t targets = gather.axis[0].count * gather.axis[1].count * gather.axis[2].count;
    const int64_t taps = gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps;
    plan.blocks = ceil_divide(gather.target_channels, SplitPlan::kColumns);
    plan.blocks_a_task = plan.blocks;
    plan.samples = 1;
    int64_t others = gather.batch, enough = kManyVoxels / 4;
    if (taps * gather.source_channels * gather.target_channels * value_bytes > kLargeWeights) {
        const int64_t tiles = ceil_divide(gather.batch * targets, kManyVoxels);
        const int64_t groups = larger(ceil_divide(kFewTasks, tiles), ceil_divide(plan.blocks, kFewBlocks));
        plan.blocks_a_task = ceil_divide(plan.blocks, smaller(groups, plan.blocks));
        const int64_t samples = smaller(larger(kManyVoxels / targets, 1), gather.batch);
        plan.samples = ceil_divide(gather.batch, ceil_divide(gather.batch, samples));
        others = targets <= kManyVoxels ? kManyTasks : gather.batch * ceil_divide(plan.blocks, plan.blocks_a_task);
        enough = kManyVoxels / plan.samples;
    }
    const int64_t most = choose_tiling(gather, {kAnySize, kAnySize, others, 1, true}).voxels();
    do {
        ++plan.chunks;
        plan.chunk = ceil_divide(gather.source_channels, plan.chunks);
        if (plan.chunks > 1) plan.chunk = ceil_divide(plan.chunk, kTileValues) * kTileValues;
        const int64_t waiting = (plan.chunks == 1 ? 1 : plan.blocks_a_task) * SplitPlan::kColumns * plan.samples;
        const int64_t voxels = kSumBytes / (waiting * static_cast<int64_t>(sizeof(float)));
        const int64_t packed = source_bytes / (plan.chunk * value_bytes * plan.samples);
        plan.tiling = choose_tiling(gather, {packed, voxels, others, 1, true});
    } while (plan.chunk > 2 * kTileValues && plan.tiling.voxels() < smaller(enough, most));
    plan.chunks = ceil_divide(gather.source_channels, plan.chunk);
}

inline SplitPlan make_split_plan(const Gather& gather, int parts) {
    SplitPlan plan = {};
    plan.parts = parts;
    cut_into_tasks(gather, plan);

    const PackedAxis* packed = plan.tiling.axis;
    plan.joined = packed[2].tap_step == 1;
    plan.runs = gather.axis[0].taps * gather.axis[1].taps * (plan.joined ? 1 : gather.axis[2].taps);
    plan.run = plan.chunk * (plan.joined ? gather.axis[2].taps : 1);
    plan.run_steps = ceil_divide(plan.run, kTileValues);
    plan.offsets = static_cast<int32_t*>(
        scratch_bytes(Scratch::tables, static_cast<size_t>(larger(plan.steps(), 1)) * sizeof(int32_t)));
    int32_t* offset = plan.offsets;
    for (int64_t run = 0; run < plan.runs; ++run) {
        const int64_t widths = plan.joined ? 1 : gather.axis[2].taps, tap = run / widths;
        const int64_t first = tap / gather.axis[1].taps * packed[0].tap_step * plan.row_values(0) +
                              tap % gather.axis[1].taps * packed[1].tap_step * plan.row_values(1) +
                              run % widths * packed[2].tap_step * plan.chunk;
        for (int64_t step = 0; step < plan.run_steps; ++step) {
            *offset++ = static_cast<int32_t>(first + step * kTileValues);
        }
    }

    const int64_t height = packed[1].tile, width = packed[2].tile, between = packed[1].voxel_step * packed[2].rows;
    if (packed[2].voxel_step > 0 && between % packed[2].voxel_step == 0) {
        plan.pitch = between / packed[2].voxel_step;
        const int64_t plane = ceil_divide((height - 1) * plan.pitch + width, kTileRows);
        plan.flat = plane < height * ceil_divide(width, kTileRows);
    }
    return plan;
}

#endif

}  // namespace
}  // namespace pvc
