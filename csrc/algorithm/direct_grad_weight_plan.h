// How the weight gradient of one problem is cut into tiles, runs, slabs, splits and units.
//
//   grad_weight[oc][tap][ic] = sum over voxels v of  grad_output[v][oc] * x[v * stride - padding + tap * dilation][ic]
//
// is a product of a (C_out x voxels) and a (voxels x taps * C_in) matrix, the second never formed: it is a packed
// window of x read at shifted offsets. What the lanes of a vector run over decides which operand makes rows and
// columns:
//
//   Lanes          row (a value or a vector)      column (a vector)             tile kernel
//   in_channels    one output channel             tap x block of C_in           outer
//   out_channels   tap x one input channel        block of C_out                outer
//   width          one output channel             tap x one input channel       lanes; its lanes are summed at the end
//   channels       block of C_out (depthwise)     tap, C_in laid like C_out     lanes
//
//   tile    MR rows x NR columns, in registers
//   run     voxels over which a tile stays in registers; what it reads of one slab fits L1
//   slab    output voxels of one sample whose window of x is packed at once; fits L2
//   split   consecutive slabs, summed into one partial gradient; partials are added in order, so the result is the same
//           for every run and every number of threads: a split depends on the problem alone
//   unit    a group's chunk of output and input channels (channels: one vector of channels); a task is a few
//           consecutive units of one split
#pragma once

#include "../microkernel/grad_weight.h"
#include "../problem.h"
#include "tiling.h"

namespace pvc {
namespace {

enum class Lanes { in_channels, out_channels, width, channels };

struct GradWeightPlan {
    Lanes lanes;
    GradWeightKernel kernel;
    int64_t row_tile, column_tile;            // MR, NR
    int64_t out_channels, in_channels, taps;  // channels of a group
    int64_t out_chunk, in_chunk, out_chunks, in_chunks;
    int64_t units, units_per_task;
    int64_t packed_lanes;  // channels that lie side by side in the packed window
    bool flat;             // columns are vectors over (kernel width x all input channels), not over a block of channels
    bool pack_grad_output;
    int64_t rows, columns;  // of a whole unit
    PackedAxis axis[3];     // a slab: its output voxels are axis.tile, the window of x under it axis.rows
    int64_t slabs[3];
    int64_t run_voxels;
    int64_t splits;

    int64_t all_slabs(const ConvProblem& problem) const { return problem.batch * slabs[0] * slabs[1] * slabs[2]; }
    int64_t slab_voxels() const { return axis[0].tile * axis[1].tile * axis[2].tile; }
    int64_t window_voxels() const { return axis[0].rows * axis[1].rows * axis[2].rows; }
    int64_t packed_output_vectors() const { return !pack_grad_output ? 0 : lanes == Lanes::channels ? 1 : columns; }
    int64_t task_groups() const { return ceil_divide(units, units_per_task); }
};

// Channels of one unit, counted from the first of the tensor.
struct GradWeightUnit {
    int64_t out_channel, out_count, in_channel, in_count;
    int64_t rows, columns;
};

constexpr int64_t kRunVoxels = 128;
constexpr int64_t kRowEnd = 8 * 16;        // sixteenths of a cycle for a tile to go from one row of voxels to the next
constexpr int64_t kWidthRunVoxels = 1024;  // lanes along the width: a vector holds as many voxels as lanes
constexpr int64_t kWindowBytes = kL2Bytes * 3 / 8;
constexpr int64_t kChunkChannels = 64;
constexpr int64_t kPointwiseChunk = 256;  // with one tap, packing a channel again for every chunk would be seen
constexpr int64_t kTasks = 64;            // enough for every core to be busy to the end
constexpr int64_t kPartialBytes = 16 << 20;
constexpr int64_t kMinSplitVoxels = 256;

// Sixteenths of a cycle per voxel for a rows x columns product, cut evenly into tiles of at most `column_tile` columns.
inline int64_t product_cost(GradWeightKernel kernel, int64_t rows, int64_t columns, int64_t column_tile) {
    const EvenCut column_cut(columns, column_tile);
    const EvenCut row_cut(rows, max_tile_rows(kernel, static_cast<int>(column_tile)));
    int64_t cost = 0;
    for (int64_t wide_column = 0; wide_column < 2; ++wide_column) {
        for (int64_t wide_row = 0; wide_row < 2; ++wide_row) {
            cost += row_cut.count(wide_row) * column_cut.count(wide_column) *
                    tile_cost(row_cut.low + wide_row, column_cut.low + wide_column);
        }
    }
    return cost;
}

inline int64_t best_column_tile(GradWeightKernel kernel, int64_t rows, int64_t columns) {
    int64_t best = 1;
    for (int64_t nr = 2; nr <= smaller(kMaxTileColumns, columns); ++nr) {
        if (max_tile_rows(kernel, static_cast<int>(nr)) == 0) break;
        if (product_cost(kernel, rows, columns, nr) <= product_cost(kernel, rows, columns, best)) best = nr;
    }
    return best;
}

// Rows, columns and packing of one way to use the lanes, for a unit of out_count x in_count channels.
template <typename T>
void shape_unit(const ConvProblem& problem, int64_t out_count, int64_t in_count, GradWeightPlan* plan) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const int64_t taps = plan->taps, width = problem.kernel_size[2];
    const bool last = problem.layout == Layout::ndhwc;
    const bool adjacent_taps = width == 1 || (problem.dilation[2] == 1 && problem.stride[2] <= width);
    plan->kernel = GradWeightKernel::lanes;
    plan->flat = false;
    plan->pack_grad_output = false;
    switch (plan->lanes) {
        case Lanes::in_channels: {
            const int64_t blocked = taps * ceil_divide(in_count, lanes);
            const int64_t flat = taps / width * ceil_divide(width * in_count, lanes);
            plan->kernel = GradWeightKernel::outer;
            plan->flat = in_count == plan->in_channels && flat < blocked && adjacent_taps;
            plan->packed_lanes = plan->flat ? in_count : lanes;
            plan->rows = out_count;
            plan->columns = plan->flat ? flat : blocked;
            break;
        }
        case Lanes::out_channels:
            plan->kernel = GradWeightKernel::outer;
            plan->packed_lanes = last ? in_count : 1;
            plan->rows = taps * in_count;
            plan->columns = ceil_divide(out_count, lanes);
            plan->pack_grad_output = !last || plan->out_channels % lanes != 0;
            break;
        case Lanes::width:
            plan->packed_lanes = 1;
            plan->rows = out_count;
            plan->columns = taps * in_count;
            break;
        case Lanes::channels:
            plan->packed_lanes = lanes;
            plan->rows = 1;
            plan->columns = taps;
            plan->pack_grad_output = !last || problem.out_channels % lanes != 0;
            break;
    }
    plan->column_tile = best_column_tile(plan->kernel, plan->rows, plan->columns);
    plan->row_tile = max_tile_rows(plan->kernel, static_cast<int>(plan->column_tile));
}

// Estimated cost per output voxel of all units, in sixteenths of a cycle. Constants are measured: turning a value of
// grad_output channels-last costs about half a cycle, unaligned vectors along the width about 15%.
template <typename T>
int64_t plan_cost(const ConvProblem& problem, GradWeightPlan* plan) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const bool depthwise = plan->lanes == Lanes::channels;
    shape_unit<T>(problem, plan->out_channels, plan->in_channels, plan);
    const int64_t units = depthwise ? ceil_divide(problem.out_channels, lanes) : problem.groups;
    int64_t cost = units * product_cost(plan->kernel, plan->rows, plan->columns, plan->column_tile);
    if (plan->lanes == Lanes::width) {
        const int64_t width = problem.output_size[2];
        const int64_t tiles = ceil_divide(plan->rows, plan->row_tile) * ceil_divide(plan->columns, plan->column_tile);
        cost = cost * 115 / 100 * ceil_divide(width, lanes) / width + units * tiles * kRowEnd / width;
    }
    if (plan->pack_grad_output) cost += 14 * problem.out_channels;
    if (problem.layout == Layout::ncdhw && plan->packed_lanes > 1) cost += 12 * problem.in_channels;
    return cost;
}

template <typename T>
bool lanes_fit(const ConvProblem& problem, const GradWeightPlan& plan, Lanes lanes) {
    if (lanes == Lanes::width) {
        return problem.layout == Layout::ncdhw && problem.output_size[2] >= Vector<T>::lanes;
    }
    return lanes != Lanes::channels || plan.in_channels == 1;
}

// The size of `chunk` when `channels` are cut evenly into chunks of at most `most`, a multiple of `multiple`.
inline int64_t even_chunk(int64_t channels, int64_t most, int64_t multiple) {
    if (channels <= most) return channels;
    return ceil_divide(ceil_divide(channels, ceil_divide(channels, most)), multiple) * multiple;
}

// Cuts the output into slabs of at most `slab` voxels, evenly.
inline void set_slab(const ConvProblem& problem, const int64_t slab[3], GradWeightPlan* plan) {
    for (int a = 0; a < 3; ++a) {
        const int64_t size = problem.output_size[a];
        const int64_t tile = ceil_divide(size, ceil_divide(size, slab[a]));
        plan->axis[a] = pack_axis(forward_axis(problem, a), tile, a == 2 && plan->lanes == Lanes::width);
        plan->slabs[a] = ceil_divide(size, tile);
    }
}

// Largest slab whose operands stay within kWindowBytes: shrinks depth, then height, then width; then shrinks further
// while there are fewer slabs than tasks wanted.
template <typename T>
void choose_slab(const ConvProblem& problem, GradWeightPlan* plan) {
    const int64_t in_lanes = ceil_divide(plan->in_chunk, plan->packed_lanes) * plan->packed_lanes;
    const int64_t out_lanes = plan->packed_output_vectors() * Vector<T>::lanes;
    const int64_t least_width = plan->lanes == Lanes::width ? problem.output_size[2] : 32;
    int64_t slab[3] = {problem.output_size[0], problem.output_size[1], problem.output_size[2]};
    for (;;) {
        set_slab(problem, slab, plan);
        const int64_t values = plan->window_voxels() * in_lanes + plan->slab_voxels() * out_lanes;
        const bool large = values * static_cast<int64_t>(sizeof(T)) > kWindowBytes;
        const bool few = plan->all_slabs(problem) * plan->task_groups() < kTasks / 2;
        if (!large && !(few && plan->slab_voxels() > kMinSplitVoxels)) return;
        for (int a = 0; a < 3; ++a) slab[a] = plan->axis[a].tile;
        if (slab[0] > 1) {
            slab[0] /= 2;
        } else if (slab[1] > 1) {
            slab[1] /= 2;
        } else if (slab[2] > least_width) {
            slab[2] = larger(slab[2] / 2, least_width);
        } else {
            return;
        }
    }
}

template <typename T>
GradWeightPlan plan_grad_weight(const ConvProblem& problem) {
    constexpr int64_t lanes = Vector<T>::lanes;
    GradWeightPlan plan = {};
    plan.out_channels = problem.out_channels / problem.groups;
    plan.in_channels = problem.in_channels / problem.groups;
    plan.taps = problem.kernel_size[0] * problem.kernel_size[1] * problem.kernel_size[2];

    Lanes best = Lanes::in_channels;
    int64_t best_cost = INT64_MAX;
    constexpr Lanes choices[] = {Lanes::in_channels, Lanes::out_channels, Lanes::width, Lanes::channels};
    for (const Lanes choice : choices) {
        if (!lanes_fit<T>(problem, plan, choice)) continue;
        plan.lanes = choice;
        const int64_t cost = plan_cost<T>(problem, &plan);
        if (cost < best_cost) {
            best = choice;
            best_cost = cost;
        }
    }
    plan.lanes = best;
    if (best == Lanes::channels) {
        plan.out_chunk = lanes;
        plan.in_chunk = 1;
        plan.units = ceil_divide(problem.out_channels, lanes);
        plan.units_per_task = smaller(plan.units, ceil_divide(kChunkChannels, lanes));
    } else {
        const int64_t most = plan.taps == 1 ? kPointwiseChunk : kChunkChannels;
        plan.out_chunk = even_chunk(plan.out_channels, most, lanes);
        plan.in_chunk = even_chunk(plan.in_channels, most, lanes);
        plan.out_chunks = ceil_divide(plan.out_channels, plan.out_chunk);
        plan.in_chunks = ceil_divide(plan.in_channels, plan.in_chunk);
        plan.units = problem.groups * plan.out_chunks * plan.in_chunks;
        plan.units_per_task = smaller(problem.groups, larger(1, kChunkChannels / plan.out_channels));
    }
    shape_unit<T>(problem, plan.out_chunk, plan.in_chunk, &plan);
    choose_slab<T>(problem, &plan);
    plan.run_voxels = best == Lanes::width ? kWidthRunVoxels : kRunVoxels;

    const int64_t voxels = problem.batch * problem.output_size[0] * problem.output_size[1] * problem.output_size[2];
    const int64_t partial_bytes = plan.units * plan.rows * plan.columns * PVC_VECTOR_BYTES;
    plan.splits = ceil_divide(kTasks, plan.task_groups());
    plan.splits = smaller(plan.splits, plan.all_slabs(problem));
    plan.splits = smaller(plan.splits, voxels / kMinSplitVoxels);
    plan.splits = larger(smaller(plan.splits, kPartialBytes / partial_bytes), 1);
    return plan;
}

template <typename T>
GradWeightUnit grad_weight_unit(const ConvProblem& problem, const GradWeightPlan& plan, int64_t index) {
    constexpr int64_t lanes = Vector<T>::lanes;
    GradWeightUnit unit;
    if (plan.lanes == Lanes::channels) {
        unit.out_channel = index * lanes;
        unit.out_count = smaller(lanes, problem.out_channels - unit.out_channel);
        unit.in_channel = unit.out_channel / plan.out_channels;
        unit.in_count = 1;
        unit.rows = plan.rows;
        unit.columns = plan.columns;
        return unit;
    }
    const int64_t in = index % plan.in_chunks * plan.in_chunk;
    const int64_t out = index / plan.in_chunks % plan.out_chunks * plan.out_chunk;
    const int64_t group = index / (plan.in_chunks * plan.out_chunks);
    unit.out_channel = group * plan.out_channels + out;
    unit.out_count = smaller(plan.out_chunk, plan.out_channels - out);
    unit.in_channel = group * plan.in_channels + in;
    unit.in_count = smaller(plan.in_chunk, plan.in_channels - in);
    const bool rows_in = plan.lanes == Lanes::out_channels;
    unit.rows = rows_in ? plan.taps * unit.in_count : unit.out_count;
    if (plan.lanes == Lanes::in_channels) {
        unit.columns = plan.flat ? plan.columns : plan.taps * ceil_divide(unit.in_count, lanes);
    } else {
        unit.columns = rows_in ? ceil_divide(unit.out_count, lanes) : plan.taps * unit.in_count;
    }
    return unit;
}

}  // namespace
}  // namespace pvc
