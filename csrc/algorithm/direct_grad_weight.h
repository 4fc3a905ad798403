// The weight gradient of one problem: packs windows of x, runs the tiles of algorithm/direct_grad_weight_plan.h over
// them into one partial gradient per split, and adds the partials in order.
#pragma once

#include "../arena.h"
#include "../microkernel/grad_weight_pack.h"
#include "../parallel.h"
#include "depthwise_grad_weight.h"
#include "direct_grad_weight_plan.h"
#include "direct_grad_weight_reduce.h"

namespace pvc {
namespace {

template <typename T>
struct GradWeightPass {
    static constexpr int64_t lanes = Vector<T>::lanes;

    const ConvProblem& problem;
    const GradWeightPlan plan;
    const T* grad_output;
    const T* x;
    const VolumeStrides output_strides, input_strides;
    GatherAxis output_axis[3], input_axis[3];
    PackedAxis output_packed[3];
    int64_t output_step[3], input_step[3];  // elements from one output voxel to the next, in what the kernels read
    int64_t window_block;                   // elements of one packed block of input channels
    int64_t* row_offsets;
    int64_t* column_offsets;

    GradWeightPass(const ConvProblem& problem, const T* grad_output, const T* x)
        : problem(problem),
          plan(plan_grad_weight<T>(problem)),
          grad_output(grad_output),
          x(x),
          output_strides(volume_strides(problem.layout, problem.out_channels, problem.output_size)),
          input_strides(volume_strides(problem.layout, problem.in_channels, problem.input_size)),
          window_block(plan.window_voxels() * plan.packed_lanes),
          row_offsets(scratch<int64_t>(Scratch::tables, plan.rows + plan.columns)),
          column_offsets(row_offsets + plan.rows) {
        const int64_t input_pitch[3] = {plan.axis[1].rows * plan.axis[2].rows, plan.axis[2].rows, 1};
        const int64_t output_pitch[3] = {plan.axis[1].tile * plan.axis[2].tile, plan.axis[2].tile, 1};
        for (int a = 0; a < 3; ++a) {
            input_axis[a] = forward_axis(problem, a);
            const int64_t size = problem.output_size[a];
            output_axis[a] = {size, 0, 1, 1, 1, 0, 1, size, size, 0, 1};
            output_packed[a] = pack_axis(output_axis[a], plan.axis[a].tile, false);
            input_step[a] = plan.axis[a].voxel_step * input_pitch[a] * plan.packed_lanes;
            output_step[a] = plan.pack_grad_output ? output_pitch[a] * lanes : output_strides.axis[a];
        }
        if (plan.lanes == Lanes::width) input_step[2] = output_step[2] = lanes;
        for (int64_t r = 0; r < plan.rows; ++r) row_offsets[r] = row_offset(r);
        for (int64_t c = 0; c < plan.columns; ++c) column_offsets[c] = column_offset(c);
    }

    int64_t input_offset(int64_t channel, int64_t tap) const {
        const int64_t* kernel = problem.kernel_size;
        const PackedAxis* axis = plan.axis;
        const int64_t depth = tap / (kernel[1] * kernel[2]) * axis[0].tap_step;
        const int64_t height = tap / kernel[2] % kernel[1] * axis[1].tap_step;
        const int64_t width = tap % kernel[2] * axis[2].tap_step;
        const int64_t voxel = (depth * axis[1].rows + height) * axis[2].rows + width;
        return channel / plan.packed_lanes * window_block + voxel * plan.packed_lanes + channel % plan.packed_lanes;
    }

    int64_t row_offset(int64_t row) const {
        if (plan.lanes == Lanes::out_channels) return input_offset(row / plan.taps, row % plan.taps);
        return row * output_strides.channel;
    }

    int64_t column_offset(int64_t column) const {
        if (plan.lanes == Lanes::in_channels) {
            if (!plan.flat) return input_offset(column / plan.taps * lanes, column % plan.taps);
            const int64_t kernel_rows = plan.taps / problem.kernel_size[2], vectors = plan.columns / kernel_rows;
            return input_offset(0, column / vectors * problem.kernel_size[2]) + column % vectors * lanes;
        }
        if (plan.lanes == Lanes::out_channels) {
            const int64_t voxels = plan.pack_grad_output ? plan.slab_voxels() : 1;
            return column * lanes * voxels;
        }
        return input_offset(column / plan.taps, column % plan.taps);
    }

    // Packs what a unit needs of x. `window` has room for the largest unit and one vector more, which flat columns
    // read.
    void pack_input(const GradWeightUnit& unit, int64_t sample, const int64_t slab[3], T* window) const {
        const bool depthwise = plan.lanes == Lanes::channels;
        const int64_t count = depthwise ? unit.out_count : unit.in_count;
        int64_t origin[3];
        for (int a = 0; a < 3; ++a) origin[a] = slab[a] * problem.stride[a] - problem.padding_begin[a];
        const T* data = x + sample * input_strides.sample + unit.in_channel * input_strides.channel;
        for (int64_t c = 0; c < count; c += plan.packed_lanes) {
            const int64_t filled = smaller(plan.packed_lanes, count - c);
            ChannelBlock<T> block = {data, input_strides, plan.packed_lanes, filled, 0, 1};
            if (depthwise) {
                block.first_lane = unit.out_channel % plan.out_channels;
                block.repeat = plan.out_channels;
            } else {
                block.data += c * input_strides.channel;
            }
            pack_window(block, input_axis, plan.axis, origin, window + c / plan.packed_lanes * window_block);
        }
    }

    // The unit's gradients from the slab's first voxel on, packed or in place.
    const T* slab_grad_output(const GradWeightUnit& unit, int64_t sample, const int64_t slab[3], T* packed) const {
        const T* data = grad_output + sample * output_strides.sample + unit.out_channel * output_strides.channel;
        if (!plan.pack_grad_output) {
            for (int a = 0; a < 3; ++a) data += slab[a] * output_strides.axis[a];
            return data;
        }
        for (int64_t c = 0; c < unit.out_count; c += lanes) {
            const ChannelBlock<T> block = {
                data + c * output_strides.channel, output_strides, lanes, smaller(lanes, unit.out_count - c), 0, 1};
            pack_window(block, output_axis, output_packed, slab, packed + c * plan.slab_voxels());
        }
        return packed;
    }

    // The operand that takes more bytes of L1 per tile stays there in the inner loop.
    void run_tiles(const GradWeightUnit& unit, const VoxelRun& run, const T* rows, const T* columns, T* sums) const {
        const EvenCut column_cut(unit.columns, plan.column_tile), row_cut(unit.rows, plan.row_tile);
        const auto run_tile = [&](int64_t i, int64_t j) {
            const int64_t r = row_cut.start(i), mr = row_cut.size(i), c = column_cut.start(j), nr = column_cut.size(j);
            grad_weight_tile<T>(plan.kernel, mr, nr)(run, rows, row_offsets + r, columns, column_offsets + c,
                                                     sums + (c * unit.rows + r * nr) * lanes);
        };
        if (plan.lanes == Lanes::width) {
            for (int64_t i = 0; i < row_cut.parts; ++i) {
                for (int64_t j = 0; j < column_cut.parts; ++j) {
                    for (int64_t r = row_cut.start(i); r < row_cut.start(i + 1); ++r) {
                        prefetch_part(rows + row_offsets[r] + run.voxels, run.voxels, j, column_cut.parts);
                    }
                    run_tile(i, j);
                }
            }
        } else {
            const bool in_place = plan.lanes == Lanes::out_channels && !plan.pack_grad_output && plan.units == 1;
            const int64_t values = in_place ? run.voxels * problem.out_channels : 0;
            for (int64_t j = 0; j < column_cut.parts; ++j) {
                for (int64_t i = 0; i < row_cut.parts; ++i) {
                    if (j == 0) prefetch_part(columns + values, values, i, row_cut.parts);
                    run_tile(i, j);
                }
            }
        }
    }

    // With few input channels, memory is half of the time: the gradients of the next run are asked for, a part at every
    // tile, while this one computes. They follow those of this run, except at the end of a slab.
    static inline void prefetch_part(const T* from, int64_t count, int64_t part, int64_t parts) {
        constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
        const int64_t end = count * (part + 1) / parts;
        for (int64_t i = count * part / parts; i < end; i += line) __builtin_prefetch(from + i);
    }

    // Adds the slab's share to the sums of a unit, run by run.
    void run_slab(const GradWeightUnit& unit, const int64_t extent[3], const T* gradients, const T* window,
                  T* sums) const {
        const bool rows_are_input = plan.lanes == Lanes::out_channels;
        VoxelRun run = {};
        for (int a = 0; a < 3; ++a) {
            run.row_step[a] = rows_are_input ? input_step[a] : output_step[a];
            run.column_step[a] = rows_are_input ? output_step[a] : input_step[a];
        }
        const bool along_width = plan.lanes == Lanes::width;
        run.extent[2] = along_width ? extent[2] / lanes : extent[2];
        run.tail = along_width ? extent[2] % lanes : 0;
        const EvenCut heights(extent[1], larger(plan.run_voxels / extent[2], 1));
        const EvenCut depths(extent[0], larger(plan.run_voxels / (extent[1] * extent[2]), 1));
        for (int64_t i = 0; i < depths.parts; ++i) {
            for (int64_t j = 0; j < heights.parts; ++j) {
                run.extent[0] = depths.size(i);
                run.extent[1] = heights.size(j);
                run.voxels = run.extent[0] * run.extent[1] * extent[2];
                const T* output = gradients + depths.start(i) * output_step[0] + heights.start(j) * output_step[1];
                const T* input = window + depths.start(i) * input_step[0] + heights.start(j) * input_step[1];
                run_tiles(unit, run, rows_are_input ? input : output, rows_are_input ? output : input, sums);
            }
        }
    }

    // Sums the slabs [first, last) for the units [first_unit, last_unit) into `sums`, one unit after the other.
    void run_task(int64_t first_unit, int64_t last_unit, int64_t first, int64_t last, T* sums) const {
        const int64_t unit_size = plan.rows * plan.columns * lanes;
        const int64_t window_size = ceil_divide(plan.in_chunk, plan.packed_lanes) * window_block;
        T* window = scratch<T>(Scratch::tile_input, window_size + lanes);
        T* packed = scratch<T>(Scratch::tile_output, plan.slab_voxels() * plan.packed_output_vectors() * lanes);
        std::memset(window + window_size, 0, lanes * sizeof(T));
        std::memset(sums, 0, static_cast<size_t>((last_unit - first_unit) * unit_size) * sizeof(T));
        for (int64_t index = first; index < last; ++index) {
            const int64_t w = index % plan.slabs[2], h = index / plan.slabs[2] % plan.slabs[1];
            const int64_t d = index / (plan.slabs[2] * plan.slabs[1]) % plan.slabs[0];
            const int64_t sample = index / (plan.slabs[2] * plan.slabs[1] * plan.slabs[0]);
            const int64_t slab[3] = {d * plan.axis[0].tile, h * plan.axis[1].tile, w * plan.axis[2].tile};
            int64_t extent[3];
            for (int a = 0; a < 3; ++a) extent[a] = smaller(plan.axis[a].tile, problem.output_size[a] - slab[a]);
            for (int64_t u = first_unit; u < last_unit; ++u) {
                const GradWeightUnit unit = grad_weight_unit<T>(problem, plan, u);
                pack_input(unit, sample, slab, window);
                const T* gradients = slab_grad_output(unit, sample, slab, packed);
                run_slab(unit, extent, gradients, window, sums + (u - first_unit) * unit_size);
            }
        }
    }
};

template <typename T>
void direct_grad_weight(const ConvProblem& given, const T* grad_output, const T* x, T* grad_weight) {
    const ConvProblem problem = with_long_rows(given);
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    if (is_depthwise_grad_weight<T>(gather)) {
        depthwise_grad_weight(gather, grad_output, x, grad_weight);
        return;
    }
    const GradWeightPass<T> pass(problem, grad_output, x);
    const GradWeightPlan& plan = pass.plan;
    const int64_t partial_size = plan.units * plan.rows * plan.columns * Vector<T>::lanes;
    const int64_t slabs = plan.all_slabs(problem), groups = plan.task_groups();
    T* partials = scratch<T>(Scratch::shared_partials, plan.splits * partial_size);
    parallel_for(plan.splits * groups, [&](int64_t task) {
        const int64_t split = task / groups, first_unit = task % groups * plan.units_per_task;
        T* sums = partials + split * partial_size + first_unit * (partial_size / plan.units);
        pass.run_task(first_unit, smaller(first_unit + plan.units_per_task, plan.units), split * slabs / plan.splits,
                      (split + 1) * slabs / plan.splits, sums);
    });
    reduce_grad_weight(problem, plan, partials, partial_size, grad_weight);
}

}  // namespace
}  // namespace pvc
