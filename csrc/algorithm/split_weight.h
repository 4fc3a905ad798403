// Weights as right operands of a matrix unit: split into parts, pairs of reduction elements side by side.
#pragma once

#include "split_plan.h"
#include "transpose.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// The 32 values of a step for one target channel, zero beyond the run and the channels that exist.
inline void read_step(const Gather& gather, const SplitPlan& plan, const float* channel, int64_t chunk, int64_t run,
                      int64_t step, float* values) {
    const GatherAxis* axis = gather.axis;
    const int64_t widths = plan.joined ? 1 : axis[2].taps, tap = run / widths;
    const int64_t index[3] = {tap / axis[1].taps, tap % axis[1].taps, run % widths};
    const float* from = channel;
    for (int a = 0; a < 3; ++a) {
        from += (axis[a].weight_first + index[a] * axis[a].weight_step) * gather.weight_tap_stride[a];
    }
    const int64_t width_stride = axis[2].weight_step * gather.weight_tap_stride[2];
    int64_t element = step * kTileValues, width = element / plan.chunk, source = element % plan.chunk;
    for (int64_t i = 0; i < kTileValues; ++i, ++element) {
        const int64_t existing = chunk * plan.chunk + source;
        const bool exists = element < plan.run && existing < gather.source_channels;
        values[i] = exists ? from[width * width_stride + existing * gather.weight_source_stride] : 0;
        if (++source == plan.chunk) {
            source = 0;
            ++width;
        }
    }
}

// All steps of one chunk for one block of target channels. Returns whether all values can be split.
template <int Parts>
bool pack_split_weights(const Gather& gather, const SplitPlan& plan, const float* weight, int64_t block, int64_t chunk,
                        Bfloat16* packed) {
    constexpr int64_t kTile = kTileRows * kTileValues;
    const int64_t columns = plan.block_columns(block, gather.target_channels), tiles = columns / kTileRows;
    const int64_t steps = plan.steps();
    Bfloat16* to = packed + block * plan.block_weights() + chunk * steps * plan.step_weights(columns);
    alignas(64) float values[kTile];
    alignas(64) Bfloat16 parts[Parts * kTile];
    bool splits = true;
    for (int64_t step = 0; step < steps; ++step, to += plan.step_weights(columns)) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = block * SplitPlan::kColumns + tile * kTileRows;
            for (int64_t column = 0; column < kTileRows; ++column) {
                float* row = values + column * kTileValues;
                if (first + column < gather.target_channels) {
                    read_step(gather, plan, weight + (first + column) * gather.weight_target_stride, chunk,
                              step / plan.run_steps, step % plan.run_steps, row);
                } else {
                    fill_zero(row, kTileValues);
                }
            }
            splits &= split_values<Parts>(values, kTile, parts, kTile);
            for (int64_t part = 0; part < Parts; ++part) {
                transpose(reinterpret_cast<const float*>(parts + part * kTile), kTileRows,
                          reinterpret_cast<float*>(to + (part * tiles + tile) * kTile), kTileRows, kTileRows,
                          kTileRows);
            }
        }
    }
    return splits;
}

#endif

}  // namespace
}  // namespace pvc
