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
    double step;                 // one tile of sums, 32 voxels
    double source_value = 0.30;  // a value of the source copied and split
    double source_pair = 0.015;  // and put beside its neighbour, for each part and column
    double gradient_value = 0.30;
    double sums_tile = 25;  // a tile of sums read and written

    explicit SplitCosts(int parts) : step(parts == 3 ? 45 : parts == 2 ? 24 : 10) {}
};

inline double box_cost(const SplitGradWeightPlan& plan, const GatherAxis axis[3], int64_t samples,
                       const int64_t extent[3]) {
    const SplitCosts cost(plan.parts);
    const SplitBox box(axis, samples, extent);
    int64_t columns = 0;
    for (int64_t block = 0; block < plan.blocks(); ++block) columns += plan.column_tiles(plan.block_channels(block));
    const double products = static_cast<double>(columns * plan.taps * plan.target_tiles());
    const double rows = static_cast<double>(box.depth.rows * box.height.rows);
    return products * (static_cast<double>(box.steps()) * cost.step + cost.sums_tile) +
           rows * static_cast<double>(samples * box.width.rows * plan.channels) * cost.source_value +
           rows * static_cast<double>(box.pitch * columns * kTileRows * plan.parts) * cost.source_pair +
           static_cast<double>(box.steps() * kTileValues * plan.target_tiles() * kTileRows) * cost.gradient_value;
}

// Takes the box with the lowest cost per voxel among those that fit.
inline void choose_box(const GatherAxis axis[3], SplitGradWeightPlan& plan) {
    const int64_t budget = larger(l2_bytes(), 2 * kL2Bytes) * 5 / 8;
    const int64_t value_bytes = plan.parts * 2, widest = plan.block_channels(plan.blocks() - 1);
    const int64_t column_bytes = plan.column_tiles(widest) * kTileRows * value_bytes;
    const auto finer = [](int64_t parts, int64_t most) {
        return parts == most ? most + 1 : smaller(parts + larger(parts / 3, 1), most);
    };
    const auto pieces = [](int64_t size, int64_t parts) { return ceil_divide(size, ceil_divide(size, parts)); };
    double best = -1;
    for (int64_t w = 1; w <= axis[2].count; w = finer(w, axis[2].count)) {
        for (int64_t h = 1; h <= axis[1].count; h = finer(h, axis[1].count)) {
            for (int64_t d = 1; d <= axis[0].count; d = finer(d, axis[0].count)) {
                const int64_t extent[3] = {ceil_divide(axis[0].count, d), ceil_divide(axis[1].count, h),
                                           ceil_divide(axis[2].count, w)};
                const bool last = w == axis[2].count && h == axis[1].count && d == axis[0].count;
                const bool whole = w * h * d == 1;
                int64_t fitting = 0;
                for (int64_t samples = 1; samples <= (whole ? plan.batch : 1); samples = finer(samples, plan.batch)) {
                    const SplitBox box(axis, samples, extent);
                    const int64_t gradient = smaller(plan.target_tiles(), 2) * kTileRows * value_bytes;
                    const int64_t bytes = box.packed_voxels() * column_bytes + box.steps() * kTileValues * gradient;
                    if (bytes > budget && !(last && samples == 1)) break;
                    fitting = samples;
                    const double count =
                        static_cast<double>(ceil_divide(plan.batch, samples) * pieces(axis[0].count, d) *
                                            pieces(axis[1].count, h) * pieces(axis[2].count, w));
                    const double cost = box_cost(plan, axis, samples, extent) * count;
                    if (best >= 0 && cost >= best) continue;
                    best = cost;
                    plan.samples = samples;
                    for (int a = 0; a < 3; ++a) plan.extent[a] = extent[a];
                }
                if (fitting > 0) break;  // smaller ones only repeat more
            }
        }
        if (best >= 0) break;
    }
    plan.nanoseconds = best;
    for (int a = 0; a < 3; ++a) plan.boxes[a] = ceil_divide(axis[a].count, plan.extent[a]);
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
    constexpr int64_t kColumns = 256;  // at least, of a block: what reads the gradient once more
    const GatherAxis* axis = gather.axis;
    const int64_t taps = axis[0].taps * axis[1].taps, widths = axis[2].taps;
    const int64_t most = larger(ceil_divide(kColumns, taps * widths * kTileRows), widths > 3 ? 1 : 2);
    SplitGradWeightPlan plan = {parts,
                                widths == 1 || (axis[2].tap_step == 1 && axis[2].source_step <= widths),
                                taps,
                                widths,
                                gather.source_channels,
                                gather.target_channels,
                                EvenCut(ceil_divide(gather.source_channels, kTileRows), most),
                                1,
                                {},
                                {},
                                gather.batch,
                                1,
                                1,
                                0};
    choose_box(axis, plan);
    choose_tasks(axis, plan);
    return plan;
}

#endif

}  // namespace
}  // namespace pvc
