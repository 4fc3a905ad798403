// Forward and grad_input in float32 on a matrix unit that multiplies bfloat16: direct convolution with operands split
// into parts (microkernel/tile_product.h, split_plan.h). One group.
//
// An operand with an infinity, a NaN or a value that rounds to an infinite first part has no such parts; then nothing
// is promised about the result, and the caller computes it otherwise.
#pragma once

#include "../parallel.h"
#include "direct_grad_input.h"
#include "pack_source.h"
#include "split_weight.h"
#include "store_target.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

template <typename Unit, int Parts>
class SplitTask {
  public:
    SplitTask(const Gather& gather, const SplitPlan& plan, int64_t task) : gather_(gather), plan_(plan) {
        const Tiling& tiling = plan.tiling;
        const int64_t tile = task % tiling.count(), groups = ceil_divide(plan.blocks, plan.blocks_a_task);
        first_block_ = task / tiling.count() % groups * plan.blocks_a_task;
        blocks_ = smaller(plan.blocks_a_task, plan.blocks - first_block_);
        first_sample_ = task / tiling.count() / groups * plan.samples;
        samples_ = smaller(plan.samples, gather.batch - first_sample_);
        to_.width = SplitPlan::kColumns;
        from_.width = plan.chunk;
        const int64_t index[3] = {tile / tiling.tiles[2] / tiling.tiles[1], tile / tiling.tiles[2] % tiling.tiles[1],
                                  tile % tiling.tiles[2]};
        for (int axis = 0; axis < 3; ++axis) {
            to_.first[axis] = index[axis] * tiling.axis[axis].tile;
            to_.count[axis] = smaller(tiling.axis[axis].tile, gather.axis[axis].count - to_.first[axis]);
            from_.origin[axis] = gather.axis[axis].source_start + to_.first[axis] * gather.axis[axis].source_step;
        }
        plane_values_ = tiling.axis[1].rows * tiling.axis[2].rows * plan.chunk;
        plane_ = scratch<float>(Scratch::tile_output, plane_values_ + kTileValues);
        fill_zero(plane_ + plane_values_, kTileValues);
        parts_ = scratch<Bfloat16>(Scratch::tile_input, Parts * plan.part_values());
        const int64_t waiting = plan.chunks == 1 ? 1 : blocks_;
        sums_ = scratch<float>(Scratch::tile_accumulators, waiting * plan.sums_rows() * SplitPlan::kColumns);
        tiles_ = scratch<int32_t>(Scratch::tile_lists, plan.sums_rows() / kTileRows);
        list_tiles();
    }

    // Returns whether all values of the source can be split.
    bool run(const float* source, const Bfloat16* weights, const float* initial, float* target) {
        bool splits = true;
        for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
            from_.channel = chunk * plan_.chunk;
            from_.channels = smaller(plan_.chunk, gather_.source_channels - from_.channel);
            if (plan_.steps() > 0) splits &= pack(source);
            for (int64_t block = 0; block < blocks_; ++block) {
                float* sums = sums_ + (plan_.chunks == 1 ? 0 : block * plan_.sums_rows() * SplitPlan::kColumns);
                compute(chunk, first_block_ + block, weights, initial, sums);
                if (chunk + 1 == plan_.chunks) store(first_block_ + block, sums, target);
            }
        }
        return splits;
    }

  private:
    int64_t heights() const { return plan_.flat ? 1 : to_.count[1]; }
    int64_t panel_tiles() const { return ceil_divide(plan_.panel_rows(to_.count[1], to_.count[2]), kTileRows); }

    // Where in the source each tile of rows begins.
    void list_tiles() {
        const PackedAxis* packed = plan_.tiling.axis;
        int32_t* tile = tiles_;
        for (int64_t sample = 0; sample < samples_; ++sample) {
            for (int64_t d = 0; d < to_.count[0]; ++d) {
                for (int64_t h = 0; h < heights(); ++h) {
                    const int64_t panel = sample * plan_.sample_values() +
                                          d * packed[0].voxel_step * plan_.row_values(0) +
                                          h * packed[1].voxel_step * plan_.row_values(1);
                    for (int64_t i = 0; i < panel_tiles(); ++i) {
                        *tile++ = static_cast<int32_t>(panel + i * kTileRows * packed[2].voxel_step * plan_.chunk);
                    }
                }
            }
        }
    }

    bool pack(const float* source) {
        PackedAxis packed[3] = {plan_.tiling.axis[0], plan_.tiling.axis[1], plan_.tiling.axis[2]};
        const int64_t planes = packed[0].rows, stride = plan_.part_values();
        bool splits = true;
        Bfloat16* to = parts_;
        packed[0].rows = 1;
        for (int64_t plane = 0; plane < samples_ * planes; ++plane, to += plane_values_) {
            SourceBlock block = from_;
            block.sample = first_sample_ + plane / planes;
            block.origin[0] += source_position(gather_.axis[0], plan_.tiling.axis[0], plane % planes);
            pack_source(gather_, packed, false, block, source, plane_);
            splits &= split_values<Parts>(plane_, plane_values_, to, stride);
        }
        for (int part = 0; part < Parts; ++part) {  // what the last step of a run may read behind the last value
            std::memset(to + part * stride, 0, kTileValues * sizeof(Bfloat16));
        }
        return splits;
    }

    void compute(int64_t chunk, int64_t block, const Bfloat16* weights, const float* initial, float* sums) {
        const int64_t columns = plan_.block_columns(block, gather_.target_channels);
        TileProduct product = {};
        product.left_part = plan_.part_values();
        product.left_row = plan_.tiling.axis[2].voxel_step * plan_.chunk * static_cast<int64_t>(sizeof(Bfloat16));
        product.offsets = plan_.offsets;
        product.steps = plan_.steps();
        product.right = weights + block * plan_.block_weights() + chunk * plan_.steps() * plan_.step_weights(columns);
        product.sums_row = SplitPlan::kColumns * static_cast<int64_t>(sizeof(float));
        const int64_t tiles = samples_ * to_.count[0] * heights() * panel_tiles();
        for (int64_t tile = 0; tile < tiles;) {
            const int64_t now = smaller(tiles - tile, 2);
            for (int64_t i = 0; i < now; ++i) product.left[i] = parts_ + tiles_[tile + i];
            product.sums = sums + tile * kTileRows * SplitPlan::kColumns;
            product.initial = chunk == 0 ? initial + block * SplitPlan::kColumns : product.sums;
            product.initial_row = chunk == 0 ? 0 : product.sums_row;
            if (columns == kTileRows) {
                now == 1 ? tile_product<Unit, Parts, 1, 1>(unit_, product)
                         : tile_product<Unit, Parts, 2, 1>(unit_, product);
            } else {
                now == 1 ? tile_product<Unit, Parts, 1, 2>(unit_, product)
                         : tile_product<Unit, Parts, 2, 2>(unit_, product);
            }
            tile += now;
        }
    }

    void store(int64_t block, const float* sums, float* target) {
        to_.channel = block * SplitPlan::kColumns;
        to_.channels = smaller(SplitPlan::kColumns, gather_.target_channels - to_.channel);
        for (int64_t sample = 0; sample < samples_; ++sample) {
            to_.sample = first_sample_ + sample;
            for (int64_t d = 0; d < to_.count[0]; ++d) {
                for (int64_t h = 0; h < heights(); ++h) {
                    store_panel(d, h, sums, target);
                    sums += panel_tiles() * kTileRows * SplitPlan::kColumns;
                }
            }
        }
    }

    void store_panel(int64_t d, int64_t h, const float* sums, float* target) const {
        TargetBlock row = to_;
        row.first[0] += d;
        row.count[0] = row.count[1] = 1;
        const int64_t heights = plan_.flat ? to_.count[1] : 1;
        for (int64_t i = 0; i < heights; ++i) {
            row.first[1] = to_.first[1] + (plan_.flat ? i : h);
            store_channels_last(gather_, row, sums + i * plan_.pitch * SplitPlan::kColumns, target);
        }
    }

    const Gather& gather_;
    const SplitPlan& plan_;
    Unit unit_;
    int64_t first_block_, blocks_, first_sample_, samples_;
    SourceBlock from_ = {};
    TargetBlock to_ = {};
    int64_t plane_values_;
    float* plane_;
    Bfloat16* parts_;
    float* sums_;
    int32_t* tiles_;
};

// `bias` may be null. Returns whether operands could be split; if not, the result is to be computed otherwise.
template <typename Unit, int Parts>
bool split_gather(const Gather& gather, const float* source, const float* weight, const float* bias, float* target) {
    const SplitPlan plan = make_split_plan(gather, Parts);
    const int64_t weight_values = plan.blocks * plan.block_weights(), width = plan.blocks * SplitPlan::kColumns;
    float* initial = scratch<float>(Scratch::shared_weights, width + ceil_divide(weight_values, 2));
    Bfloat16* weights = reinterpret_cast<Bfloat16*>(initial + width);
    for (int64_t c = 0; c < width; ++c) initial[c] = bias != nullptr && c < gather.target_channels ? bias[c] : 0;
    bool splits = true;
    const auto note = [&](bool task_splits) {
        if (!task_splits) __atomic_store_n(&splits, false, __ATOMIC_RELAXED);
    };
    parallel_for(plan.blocks * plan.chunks, [&](int64_t task) {
        note(pack_split_weights<Parts>(gather, plan, weight, task / plan.chunks, task % plan.chunks, weights));
    });
    if (!splits) return false;
    parallel_for(plan.tasks(gather.batch), [&](int64_t task) {
        note(SplitTask<Unit, Parts>(gather, plan, task).run(source, weights, initial, target));
    });
    return splits;
}

template <typename Unit, int Parts>
bool split_forward(const ConvProblem& given, const float* x, const float* weight, const float* bias, float* y) {
    const ConvProblem problem = with_long_rows(given);
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    return split_gather<Unit, Parts>(gather, x, weight, bias, y);
}

template <typename Unit, int Parts>
bool split_grad_input(const ConvProblem& given, const float* grad_output, const float* weight, float* grad_input) {
    bool splits = true;
    for_each_residue(with_long_rows(given), [&](const Gather& gather) {
        splits = splits && split_gather<Unit, Parts>(gather, grad_output, weight, nullptr, grad_input);
    });
    return splits;
}

#endif

}  // namespace
}  // namespace pvc
