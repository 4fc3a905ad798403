// How a weight gradient is cut into products of a matrix unit (microkernel/voxel_product.h).
//
//   grad_weight[k][tap][c] = sum over voxels v of  grad_output[v][k] * x[v * stride - padding + tap * dilation][c]
//
// Rows of a tile are target channels, columns source channels, and the reduction runs over voxels, packed as
// [pair of voxels][column][2]. A tap along depth or height then shifts the source by whole packed rows, an even number
// of voxels. One along the width is folded into the columns: a column is a (tap, source channel) pair, so that few
// channels fill tiles too and packed rows have no halo. Where columns of neighbouring taps are neighbours in the
// source, as with unit dilation, they are one run of kernel width * channels.
//
//   row     target voxels with one depth and height, of all samples of a box, one after another; an even number
//   panel   the rows of one depth, or of all, with what lies between them: cut into steps of 32 voxels, of which those
//           that are no target voxels are multiplied with zeros
//   box     target voxels of a few samples whose operands are packed at once; those of a block of source channels
//           and of a block of 32 target channels fit L2
//   split   consecutive boxes that are summed into one partial gradient; partials are added in order, so the result is
//           the same for every run and every number of threads: a split depends on the problem alone
//   group   consecutive blocks of source channels; a task is a group of one split
#pragma once

#include "../cache.h"
#include "../microkernel/voxel_product.h"
#include "tiling.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// Packed rows of the source along depth or height. The targets of a tap read rows that follow one another: taps whose
// positions differ by whole strides share them, or each has rows of its own, whichever takes fewer.
struct TapRows {
    int64_t tile, stride, dilation;
    int64_t period;  // taps t and t + period share rows; 0 where none do
    int64_t length;  // rows of a set of taps that share them
    int64_t rows;

    TapRows(const GatherAxis& axis, int64_t tile) : tile(tile), stride(axis.source_step), dilation(axis.tap_step) {
        period = stride / greatest_common_divisor(stride, dilation);
        length = tile + (axis.taps - 1) * dilation / stride;
        rows = smaller(axis.taps, period) * length;
        if (tile * axis.taps < rows) {
            period = 0;
            length = tile;
            rows = tile * axis.taps;
        }
    }
    // The source position, relative to that of the first voxel and tap, that a row holds.
    int64_t position(int64_t row) const {
        const int64_t set = row / length, first = period > 0 ? set * dilation % stride : set * dilation;
        return first + row % length * stride;
    }
    // The row that the first target voxel reads for a tap.
    int64_t of_tap(int64_t tap) const {
        return period > 0 ? tap % period * length + tap * dilation / stride : tap * length;
    }
    bool dense() const { return stride == 1 && period > 0; }
};

// A box of these extents in packed order.
struct SplitBox {
    int64_t samples, extent[3];
    TapRows depth, height;
    PackedAxis width;  // of the source before taps along the width become columns
    int64_t pitch;     // voxels of a row
    int64_t panels, panel_voxels, panel_steps;

    SplitBox(const GatherAxis axis[3], int64_t samples, const int64_t extent[3])
        : samples(samples),
          extent{extent[0], extent[1], extent[2]},
          depth(axis[0], extent[0]),
          height(axis[1], extent[1]),
          width(pack_axis(axis[2], extent[2], false)) {
        pitch = samples * extent[2] + samples * extent[2] % 2;
        const int64_t plane = extent[1] * pitch, between = height.rows * pitch;
        const int64_t by_plane = extent[0] * ceil_divide(plane, kTileValues);
        const int64_t at_once = ceil_divide((extent[0] - 1) * between + plane, kTileValues);
        panels = at_once < by_plane ? 1 : extent[0];
        panel_voxels = panels == 1 ? (extent[0] - 1) * between + plane : plane;
        panel_steps = ceil_divide(panel_voxels, kTileValues);
    }
    int64_t voxels() const { return samples * extent[0] * extent[1] * extent[2]; }
    int64_t steps() const { return panels * panel_steps; }
    int64_t packed_voxels() const { return depth.rows * height.rows * pitch; }
    // Values of one part of a tile of columns, with what the last step reads behind the last voxel.
    int64_t part_values() const { return (packed_voxels() + kTileValues) * kTileRows; }
};

struct SplitGradWeightPlan {
    int parts;
    bool joined;           // columns of all taps along the width are one run
    int64_t taps, widths;  // taps along depth and height, and along the width
    int64_t channels, targets;
    EvenCut tiles;  // of 16 source channels, cut into blocks
    int64_t samples, extent[3], boxes[3], batch;
    int64_t splits, groups;
    double nanoseconds;  // expected, of one core

    int64_t blocks() const { return tiles.parts; }
    int64_t block_first(int64_t block) const { return tiles.start(block) * kTileRows; }
    int64_t block_channels(int64_t block) const {
        return smaller(tiles.size(block) * kTileRows, channels - block_first(block));
    }
    int64_t run_tiles(int64_t count) const { return ceil_divide(joined ? widths * count : count, kTileRows); }
    int64_t column_tiles(int64_t count) const { return (joined ? 1 : widths) * run_tiles(count); }
    // Tiles of sums for one tile of target channels.
    int64_t block_tiles(int64_t block) const { return taps * column_tiles(block_channels(block)); }
    int64_t target_tiles() const { return ceil_divide(targets, kTileRows); }
    int64_t all_boxes() const { return ceil_divide(batch, samples) * boxes[0] * boxes[1] * boxes[2]; }
};

// What the parts of a pass take on one core of a Sapphire Rapids, nanoseconds; only their ratios matter to a plan.
struct SplitCosts {
    double step;                   // a tile of sums, 32 voxels
    double source_value = 0.9;     // a value of the source read, copied and split
    double pair = 0.1;             // a value of a packed column, for each part
    double gradient_value = 0.9;   // a value of the gradient read, transposed and split
    double gradient_again = 0.02;  // the same read by another block of source channels, for each part
    double source_row = 100;       // a row of the source, for each block of channels
    double gradient_row = 40;      // a row of the gradient, for each tile of channels
    double sums_tile = 50;         // a tile of sums read and written

    explicit SplitCosts(int parts) : step(parts == 3 ? 45 : parts == 2 ? 24 : 10) {}
};

// Of one box.
inline double box_cost(const SplitGradWeightPlan& plan, const SplitBox& box) {
    const SplitCosts cost(plan.parts);
    const auto number = [](int64_t count) { return static_cast<double>(count); };
    int64_t columns = 0;
    for (int64_t block = 0; block < plan.blocks(); ++block) columns += plan.column_tiles(plan.block_channels(block));
    const double products = number(columns * plan.taps * plan.target_tiles());
    const double rows = number(box.depth.rows * box.height.rows), parts = plan.parts;
    const double gradient = number(box.steps() * kTileValues * plan.target_tiles() * kTileRows);
    return products * (number(box.steps()) * cost.step + cost.sums_tile) +
           rows * number(box.samples * box.width.rows * plan.channels) * cost.source_value +
           rows * number(box.samples * plan.blocks()) * cost.source_row +
           rows * number(box.pitch * columns * kTileRows) * parts * cost.pair +
           number(box.samples * box.extent[0] * box.extent[1] * plan.target_tiles()) * cost.gradient_row +
           gradient * (cost.gradient_value + number(plan.blocks() - 1) * parts * cost.gradient_again);
}

// Bytes that products of a block of source channels with 32 target channels read.
inline int64_t box_bytes(const SplitGradWeightPlan& plan, const SplitBox& box) {
    const int64_t columns = plan.column_tiles(plan.block_channels(plan.blocks() - 1));
    const int64_t rows = smaller(plan.target_tiles(), 2);
    return (box.packed_voxels() * columns + box.steps() * kTileValues * rows) * kTileRows * plan.parts * 2;
}

// Takes the box and the blocks with the lowest cost per voxel among those that fit.
inline SplitGradWeightPlan choose_box(const GatherAxis axis[3], SplitGradWeightPlan plan) {
    constexpr int64_t kLeastTiles = 2;  // 64 bytes of a voxel's channels at a time are read no faster than 128
    const int64_t budget = larger(l2_bytes(), 2 * kL2Bytes) * 11 / 16, tiles = ceil_divide(plan.channels, kTileRows);
    const auto finer = [](int64_t parts, int64_t most) {
        return parts == most ? most + 1 : smaller(parts + larger(parts / 3, 1), most);
    };
    const auto pieces = [](int64_t size, int64_t extent) { return ceil_divide(size, extent); };
    SplitGradWeightPlan best = plan;
    best.nanoseconds = -1;
    const auto try_box = [&](int64_t samples, const int64_t extent[3], bool smallest) {
        const SplitBox box(axis, samples, extent);
        if (box_bytes(plan, box) > budget && !smallest) return false;
        const int64_t count = pieces(plan.batch, samples) * pieces(axis[0].count, extent[0]) *
                              pieces(axis[1].count, extent[1]) * pieces(axis[2].count, extent[2]);
        const double cost = box_cost(plan, box) * static_cast<double>(count);
        if (best.nanoseconds >= 0 && cost >= best.nanoseconds) return true;
        best = plan;
        best.nanoseconds = cost;
        best.samples = samples;
        for (int a = 0; a < 3; ++a) {
            best.extent[a] = extent[a];
            best.boxes[a] = pieces(axis[a].count, extent[a]);
        }
        return true;
    };
    for (int64_t block = kLeastTiles; block < 2 * larger(tiles, kLeastTiles); block *= 2) {
        plan.tiles = EvenCut(tiles, block);
        for (int64_t w = 1; w <= axis[2].count; w = finer(w, axis[2].count)) {
            for (int64_t h = 1; h <= axis[1].count; h = finer(h, axis[1].count)) {
                for (int64_t d = 1; d <= axis[0].count; d = finer(d, axis[0].count)) {
                    const int64_t extent[3] = {ceil_divide(axis[0].count, d), ceil_divide(axis[1].count, h),
                                               ceil_divide(axis[2].count, w)};
                    const bool whole = w * h * d == 1;
                    const bool smallest = block == kLeastTiles && extent[0] * extent[1] * extent[2] == 1;
                    if (!try_box(1, extent, smallest)) continue;
                    for (int64_t samples = 2; whole && samples <= plan.batch; samples = finer(samples, plan.batch)) {
                        if (!try_box(samples, extent, false)) break;
                    }
                    break;  // smaller ones only repeat more
                }
            }
        }
    }
    return best;
}

// Splits make partial sums to add, groups have the gradient packed again.
inline void choose_tasks(const GatherAxis axis[3], SplitGradWeightPlan& plan) {
    constexpr int64_t kTasks = 8;
    const SplitCosts cost(plan.parts);
    const int64_t voxels = plan.batch * axis[0].count * axis[1].count * axis[2].count;
    const double gradient = static_cast<double>(voxels * plan.targets) * cost.gradient_value;
    int64_t tiles = 0;
    for (int64_t block = 0; block < plan.blocks(); ++block) tiles += plan.block_tiles(block);
    const double partial = static_cast<double>(tiles * plan.target_tiles()) * 4 * cost.sums_tile;
    double best = -1;
    for (int64_t groups = 1; groups <= smaller(kTasks, plan.blocks()); groups *= 2) {
        const int64_t boxes = plan.all_boxes();
        const int64_t splits = larger(smaller(ceil_divide(2 * kTasks, groups), boxes), 1);
        const double idle = 0.5 / static_cast<double>(splits * groups) * plan.nanoseconds;
        const double total = static_cast<double>(groups - 1) * gradient + static_cast<double>(splits) * partial + idle;
        if (best >= 0 && total >= best) continue;
        best = total;
        plan.groups = groups;
        plan.splits = splits;
    }
    plan.nanoseconds += best;
}

inline SplitGradWeightPlan make_split_grad_weight_plan(const Gather& gather, int parts) {
    const GatherAxis* axis = gather.axis;
    const int64_t widths = axis[2].taps;
    const bool joined = widths == 1 || (axis[2].tap_step == 1 && axis[2].source_step <= widths);
    SplitGradWeightPlan plan = {parts,
                                joined,
                                axis[0].taps * axis[1].taps,
                                widths,
                                gather.source_channels,
                                gather.target_channels,
                                EvenCut(1, 1),
                                1,
                                {},
                                {},
                                gather.batch,
                                1,
                                1,
                                0};
    plan = choose_box(axis, plan);
    choose_tasks(axis, plan);
    return plan;
}

#endif

}  // namespace
}  // namespace pvc
