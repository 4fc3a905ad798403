// Adds the partial weight gradients in the order of their splits and writes them in the weight's own layout.
#pragma once

#include "../parallel.h"
#include "direct_grad_weight_plan.h"

namespace pvc {
namespace {

// Writes the values of one summed vector: `row` and `column` are counted in the unit.
template <typename T>
void store_grad_weight(const ConvProblem& problem, const GradWeightPlan& plan, const GradWeightUnit& unit, int64_t row,
                       int64_t column, const T* sums, T* grad_weight) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const bool last = problem.layout == Layout::ndhwc;
    const int64_t taps = plan.taps, first_in = plan.lanes == Lanes::channels ? 0 : unit.in_channel % plan.in_channels;
    const auto at = [&](int64_t out, int64_t in, int64_t tap) -> T& {
        const int64_t of_filter = last ? tap * plan.in_channels + first_in + in : (first_in + in) * taps + tap;
        return grad_weight[(unit.out_channel + out) * taps * plan.in_channels + of_filter];
    };
    switch (plan.lanes) {
        case Lanes::in_channels:
            if (plan.flat) {
                const int64_t width = problem.kernel_size[2], vectors = plan.columns * width / taps;
                const int64_t first_tap = column / vectors * width, first = column % vectors * lanes;
                const int64_t count = smaller(lanes, width * unit.in_count - first);
                for (int64_t i = 0; i < count; ++i) {
                    at(row, (first + i) % unit.in_count, first_tap + (first + i) / unit.in_count) = sums[i];
                }
            } else {
                const int64_t in = column / taps * lanes, count = smaller(lanes, unit.in_count - in);
                for (int64_t i = 0; i < count; ++i) at(row, in + i, column % taps) = sums[i];
            }
            break;
        case Lanes::out_channels: {
            const int64_t out = column * lanes, count = smaller(lanes, unit.out_count - out);
            for (int64_t i = 0; i < count; ++i) at(out + i, row / taps, row % taps) = sums[i];
            break;
        }
        case Lanes::width: {
            T total = sums[0];
            for (int64_t i = 1; i < lanes; ++i) total += sums[i];
            at(row, column / taps, column % taps) = total;
            break;
        }
        case Lanes::channels:
            for (int64_t i = 0; i < unit.out_count; ++i) at(i, 0, column) = sums[i];
            break;
    }
}

// `partials` is [split][unit][column tile][row][column of the tile][lane]; the first split is overwritten with the
// total.
template <typename T>
void reduce_grad_weight(const ConvProblem& problem, const GradWeightPlan& plan, T* partials, int64_t partial_size,
                        T* grad_weight) {
    using V = Vector<T>;
    const int64_t tiles = EvenCut(plan.columns, plan.column_tile).parts;  // of the largest unit
    parallel_for(plan.units * tiles, [&](int64_t task) {
        const GradWeightUnit unit = grad_weight_unit<T>(problem, plan, task / tiles);
        const EvenCut cut(unit.columns, plan.column_tile);
        const int64_t tile = task % tiles;
        if (tile >= cut.parts) return;
        const int64_t first = cut.start(tile), columns = cut.size(tile), size = columns * unit.rows * V::lanes;
        T* sums = partials + task / tiles * (partial_size / plan.units) + first * unit.rows * V::lanes;
        for (int64_t split = 1; split < plan.splits; ++split) {
            const T* partial = sums + split * partial_size;
            for (int64_t i = 0; i < size; i += V::lanes) V::store(sums + i, V::load(sums + i) + V::load(partial + i));
        }
        for (int64_t row = 0; row < unit.rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                const T* vector = sums + (row * columns + column) * V::lanes;
                store_grad_weight(problem, plan, unit, row, first + column, vector, grad_weight);
            }
        }
    });
}

}  // namespace
}  // namespace pvc
