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

// F(2, 3) along one axis, depth or height (A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015): a tile of two outputs takes four products, of points that are pairs of source planes (or rows) combined, in
// place of six. Along both axes, sixteen in place of thirty-six, it was no faster: points have to be written and read.
//     points:   s0 - s2, s1 + s2, s2 - s1, s1 - s3
//     weights:  w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2
//     outputs:  p0 + p1 + p2, p1 - p2 - p3
struct SplitPoint {
    int first, second, sign;  // of the source
    float weight[3];
};

constexpr SplitPoint kSplitPoints[4] = {
    {0, 2, -1, {1, 0, 0}}, {1, 2, 1, {0.5f, 0.5f, 0.5f}}, {2, 1, -1, {0.5f, -0.5f, 0.5f}}, {1, 3, -1, {0, 0, 1}}};

struct SplitPlan {
    static constexpr int64_t kColumns = 32;  // target channels that are computed together

    int parts;
    int transformed;                // the axis with tiles of two outputs, or -1
    Gather point;                   // what one point of all tiles computes: along that axis a voxel is a tile
    int64_t chunk, chunks;          // of source channels
    int64_t blocks, blocks_a_task;  // of target channels
    int64_t samples;                // of a task
    Tiling tiling;                  // of `point`
    int64_t runs, run, run_steps;   // of a chunk: runs of values, values and steps of a run
    bool joined;                    // a run has all taps along the width
    int32_t* offsets;               // of a chunk's steps
    bool flat;                      // panels are planes
    int64_t pitch;                  // panel rows between neighbours along the height, where panels are planes

    int64_t outputs(int axis) const { return axis == transformed ? 2 : 1; }
    int64_t points() const { return transformed < 0 ? 1 : 4; }
    int64_t steps() const { return runs * run_steps; }
    int64_t block_columns(int64_t block, int64_t targets) const {
        return targets - block * kColumns > kTileRows ? kColumns : kTileRows;
    }
    // Of packed weights: [block][chunk][point][step][part][tile of 16 columns].
    int64_t step_weights(int64_t columns) const { return parts * columns * kTileValues; }
    int64_t chunk_weights(int64_t columns) const { return points() * steps() * step_weights(columns); }
    int64_t block_weights() const { return chunks * chunk_weights(kColumns); }

    int64_t panels() const { return tiling.axis[0].tile * (flat ? 1 : tiling.axis[1].tile); }
    int64_t panel_rows(int64_t height, int64_t width) const { return flat ? (height - 1) * pitch + width : width; }
    // Of the sums of one point of a whole task.
    int64_t sums_rows() const {
        const int64_t rows = panel_rows(tiling.axis[1].tile, tiling.axis[2].tile);
        return samples * panels() * ceil_divide(rows, kTileRows) * kTileRows;
    }
    // Of the packed source, [point][sample][voxel][channel].
    int64_t sample_values() const { return tiling.packed_voxels() * chunk; }
    int64_t point_values() const { return samples * sample_values(); }
    // Values of one part of a task's source, with those that are read behind the last ones.
    int64_t part_values() const {
        const int64_t behind = kTileRows * tiling.axis[2].voxel_step * chunk + kTileValues;
        return ceil_divide(points() * point_values() + behind, kTileValues) * kTileValues;
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

inline int64_t taps_of(const Gather& gather) { return gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps; }

// Chooses `tiling`, `chunk` and what goes with them. Weights beyond a core's cache are read again for each tile, so
// then a task has many voxels, of several samples if need be, and few target channels. `weight_taps` are those of all
// weights; `results`: how many sums of a voxel and target channel wait for one another, or for the next chunk.
inline void cut_into_tasks(const Gather& gather, SplitPlan& plan, int64_t weight_taps, int64_t results = 1,
                           int64_t results_of_chunks = 1) {
    constexpr int64_t kSumBytes = kL2Bytes, kLargeWeights = 6 << 20, kAnySize = int64_t{1} << 40;
    constexpr int64_t kManyVoxels = 1024, kFewBlocks = 4, kFewTasks = 8, kManyTasks = 16;
    const int64_t points = plan.points(), outputs = plan.transformed < 0 ? 1 : 2;
    const int64_t source_bytes = larger(kL2Bytes, l2_bytes() / 2) / points, value_bytes = plan.parts * 2;
    const int64_t targets = gather.axis[0].count * gather.axis[1].count * gather.axis[2].count;
    const int64_t taps = taps_of(gather);
    const int64_t many_voxels = kManyVoxels / outputs;
    plan.blocks = ceil_divide(gather.target_channels, SplitPlan::kColumns);
    plan.blocks_a_task = plan.blocks;
    plan.samples = 1;
    int64_t others = gather.batch, enough = many_voxels / 4;
    if (points * weight_taps * gather.source_channels * gather.target_channels * value_bytes > kLargeWeights) {
        const int64_t tiles = ceil_divide(gather.batch * targets, many_voxels);
        const int64_t groups = larger(ceil_divide(kFewTasks, tiles), ceil_divide(plan.blocks, kFewBlocks));
        plan.blocks_a_task = ceil_divide(plan.blocks, smaller(groups, plan.blocks));
        // No more than what fits into the source's share of the cache, were no value shared by windows.
        const int64_t fitting = larger(source_bytes / (taps * 2 * kTileValues * value_bytes), 1);
        const int64_t samples = smaller(smaller(larger(many_voxels / targets, 1), fitting), gather.batch);
        plan.samples = ceil_divide(gather.batch, ceil_divide(gather.batch, samples));
        others = targets <= many_voxels ? kManyTasks : gather.batch * ceil_divide(plan.blocks, plan.blocks_a_task);
        enough = many_voxels / plan.samples;
    }
    const int64_t most = choose_tiling(gather, {kAnySize, kAnySize, others, 1, true}).voxels();
    do {
        ++plan.chunks;
        plan.chunk = ceil_divide(gather.source_channels, plan.chunks);
        if (plan.chunks > 1) plan.chunk = ceil_divide(plan.chunk, kTileValues) * kTileValues;
        const int64_t blocks = plan.chunks == 1 ? results : results_of_chunks * plan.blocks_a_task;
        const int64_t waiting = blocks * SplitPlan::kColumns * plan.samples;
        const int64_t voxels = kSumBytes / (points * waiting * static_cast<int64_t>(sizeof(float)));
        const int64_t packed = source_bytes / (plan.chunk * value_bytes * plan.samples);
        plan.tiling = choose_tiling(gather, {packed, voxels, others, 1, true});
    } while (plan.chunk > 2 * kTileValues && plan.tiling.voxels() < smaller(enough, most));
    plan.chunks = ceil_divide(gather.source_channels, plan.chunk);
}

// The axis along which tiles of two outputs save products: the one with the fewest outputs computed in vain.
inline void choose_transformed(const Gather& gather, SplitPlan& plan) {
    constexpr int64_t kManyTaps = 27;     // with fewer, writing and reading points takes longer than the products saved
    constexpr int64_t kManyVoxels = 640;  // with fewer, transforming weights does
    plan.point = gather;
    plan.transformed = -1;
    // A value that is one part would have to be rounded, and saves too few products.
    if (plan.parts == 1 || taps_of(gather) < kManyTaps) return;
    if (gather.batch * gather.axis[0].count * gather.axis[1].count * gather.axis[2].count < kManyVoxels) return;
    double least = 1.25;  // points take some time too
    for (int a = 1; a >= 0; --a) {
        const GatherAxis& axis = gather.axis[a];
        if (axis.taps != 3 || axis.source_step != 1 || axis.tap_step != 1) continue;
        const double computed = 2.0 * static_cast<double>(ceil_divide(axis.count, 2)) / static_cast<double>(axis.count);
        if (computed < least) {
            least = computed;
            plan.transformed = a;
        }
    }
    if (plan.transformed < 0) return;
    GatherAxis& axis = plan.point.axis[plan.transformed];
    axis.count = ceil_divide(axis.count, 2);
    axis.taps = 1;
}

// How the products of `plan.point` with the taps of a chunk are cut into steps.
inline void cut_into_steps(SplitPlan& plan) {
    const GatherAxis* axis = plan.point.axis;
    plan.joined = plan.tiling.axis[2].tap_step == 1;
    plan.runs = axis[0].taps * axis[1].taps * (plan.joined ? 1 : axis[2].taps);
    plan.run = plan.chunk * (plan.joined ? axis[2].taps : 1);
    plan.run_steps = ceil_divide(plan.run, kTileValues);
}

// Where each step begins, in values from where the taps of a voxel do; `first`: where they do, from the packed ones.
inline void list_steps(SplitPlan& plan, const int64_t first[3], int32_t* offset) {
    const PackedAxis* packed = plan.tiling.axis;
    const GatherAxis* axis = plan.point.axis;
    plan.offsets = offset;
    for (int64_t run = 0; run < plan.runs; ++run) {
        const int64_t widths = plan.joined ? 1 : axis[2].taps, tap = run / widths;
        const int64_t begin = (first[0] + tap / axis[1].taps) * packed[0].tap_step * plan.row_values(0) +
                              (first[1] + tap % axis[1].taps) * packed[1].tap_step * plan.row_values(1) +
                              (first[2] + run % widths) * packed[2].tap_step * plan.chunk;
        for (int64_t step = 0; step < plan.run_steps; ++step) {
            *offset++ = static_cast<int32_t>(begin + step * kTileValues);
        }
    }
}

// Whether panels are rows or planes.
inline void choose_panels(SplitPlan& plan) {
    const PackedAxis* packed = plan.tiling.axis;
    const int64_t height = packed[1].tile, width = packed[2].tile, between = packed[1].voxel_step * packed[2].rows;
    if (packed[2].voxel_step > 0 && between % packed[2].voxel_step == 0) {
        plan.pitch = between / packed[2].voxel_step;
        const int64_t plane = ceil_divide((height - 1) * plan.pitch + width, kTileRows);
        plan.flat = plane < height * ceil_divide(width, kTileRows);
    }
}

inline SplitPlan make_split_plan(const Gather& gather, int parts) {
    SplitPlan plan = {};
    plan.parts = parts;
    choose_transformed(gather, plan);
    cut_into_tasks(plan.point, plan, taps_of(plan.point));
    cut_into_steps(plan);
    const int64_t first[3] = {};
    list_steps(plan, first, scratch<int32_t>(Scratch::tables, larger(plan.steps(), 1)));
    choose_panels(plan);
    return plan;
}

#endif

}  // namespace
}  // namespace pvc
