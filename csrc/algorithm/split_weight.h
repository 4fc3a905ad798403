// Weights as right operands of a matrix unit: split into parts, pairs of reduction elements side by side.
#pragma once

#include "pack_source.h"
#include "split_plan.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// The weights of one step: 32 elements of a run, of one chunk and, along the transformed axis, one tap. S is float,
// Float16 or Bfloat16.
template <typename S>
class StepWeights {
  public:
    StepWeights(const Gather& gather, const SplitPlan& plan, const S* weight, int64_t chunk, int64_t step, int64_t tap)
        : gather_(gather), plan_(plan), first_source_(chunk * plan.chunk) {
        const GatherAxis* axis = plan.point.axis;
        const int64_t run = step / plan.run_steps, widths = plan.joined ? 1 : axis[2].taps, taps = run / widths;
        int64_t index[3] = {taps / axis[1].taps, taps % axis[1].taps, run % widths};
        if (plan.transformed >= 0) index[plan.transformed] = tap;
        weight_ = weight;
        for (int a = 0; a < 3; ++a) {
            weight_ += (axis[a].weight_first + index[a] * axis[a].weight_step) * gather.weight_tap_stride[a];
        }
        element_ = step % plan.run_steps * kTileValues;
    }

    // values[element][target channel], 32 x 16, zero where there is none.
    void read(int64_t target, float* values) const {
        const int64_t targets = smaller(kTileRows, gather_.target_channels - target);
        if (targets < kTileRows) std::memset(values, 0, kTileValues * kTileRows * sizeof(float));
        if (targets <= 0) return;
        if (gather_.weight_target_stride == 1) {
            for_each_piece([&](int64_t i, const S* from, int64_t count) {
                for (int64_t k = 0; k < count; ++k) {
                    float* to = values + (i + k) * kTileRows;
                    if (from == nullptr) {
                        fill_zero(to, kTileRows);
                    } else {
                        copy_wide(from + target + k * gather_.weight_source_stride, to, targets);
                    }
                }
            });
            return;
        }
        alignas(64) float rows[kTileRows * kTileValues];
        for (int64_t column = 0; column < targets; ++column) {
            const int64_t channel = (target + column) * gather_.weight_target_stride;
            float* row = rows + column * kTileValues;
            for_each_piece([&](int64_t i, const S* from, int64_t count) {
                if (from == nullptr) {
                    fill_zero(row + i, count);
                } else if (gather_.weight_source_stride == 1) {
                    copy_wide(from + channel, row + i, count);
                } else {
                    for (int64_t k = 0; k < count; ++k) {
                        row[i + k] = widen(from[channel + k * gather_.weight_source_stride]);
                    }
                }
            });
        }
        transpose(rows, kTileValues, values, kTileRows, targets, kTileValues);
    }

  private:
    // Calls body(i, from, count) for elements i to i + count - 1 of the step: source channels from `from` on of one
    // tap, or, where it is null, zeros.
    template <typename Body>
    void for_each_piece(const Body& body) const {
        const int64_t width_stride = gather_.axis[2].weight_step * gather_.weight_tap_stride[2];
        for (int64_t i = 0; i < kTileValues;) {
            const int64_t element = element_ + i, source = element % plan_.chunk;
            const int64_t channel = first_source_ + source, left = kTileValues - i;
            if (element >= plan_.run) {
                body(i, nullptr, left);
                return;
            }
            const bool exists = channel < gather_.source_channels;
            const int64_t until =
                exists ? smaller(gather_.source_channels - channel, plan_.chunk - source) : plan_.chunk - source;
            const int64_t count = smaller(until, left);
            const S* from = weight_ + element / plan_.chunk * width_stride + channel * gather_.weight_source_stride;
            body(i, exists ? from : nullptr, count);
            i += count;
        }
    }

    const Gather& gather_;
    const SplitPlan& plan_;
    int64_t first_source_, element_;
    const S* weight_;
};

// values[32][16] of one step and point: what the taps along the transformed axis combine to.
template <typename S>
void read_point(const Gather& gather, const SplitPlan& plan, const S* weight, int64_t chunk, int64_t point,
                int64_t step, int64_t target, float* values) {
    using V = Vector<float>;
    constexpr int64_t kTile = kTileRows * kTileValues;
    if (plan.transformed < 0) {
        StepWeights(gather, plan, weight, chunk, step, 0).read(target, values);
        return;
    }
    std::memset(values, 0, kTile * sizeof(float));
    for (int64_t tap = 0; tap < 3; ++tap) {
        const float factor = kSplitPoints[point].weight[tap];
        if (factor == 0) continue;
        alignas(64) float one[kTile];
        StepWeights(gather, plan, weight, chunk, step, tap).read(target, one);
        for (int64_t i = 0; i < kTile; i += V::lanes) {
            V::store(values + i, V::load(values + i) + factor * V::load(one + i));
        }
    }
}

// All points and steps of one chunk for one block of target channels. Returns whether all values can be split.
template <int Parts, typename S>
bool pack_split_weights(const Gather& gather, const SplitPlan& plan, const S* weight, int64_t block, int64_t chunk,
                        Bfloat16* packed) {
    constexpr int64_t kTile = kTileRows * kTileValues;
    const int64_t columns = plan.block_columns(block, gather.target_channels), tiles = columns / kTileRows;
    Bfloat16* to = packed + block * plan.block_weights() + chunk * plan.chunk_weights(columns);
    alignas(64) float values[kTile];
    bool splits = true;
    for (int64_t point = 0; point < plan.points(); ++point) {
        for (int64_t step = 0; step < plan.steps(); ++step, to += plan.step_weights(columns)) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t target = block * SplitPlan::kColumns + tile * kTileRows;
                read_point(gather, plan, weight, chunk, point, step, target, values);
                splits &= split_row_pairs<Parts>(values, to + tile * kTile, tiles * kTile);
            }
        }
    }
    return splits;
}

#endif

}  // namespace
}  // namespace pvc
