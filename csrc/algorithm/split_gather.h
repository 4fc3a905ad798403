// Forward and grad_input on a matrix unit that multiplies bfloat16: direct convolution with operands split into parts
// (microkernel/tile_product.h, split_plan.h). Tensors of S: float, Float16 or Bfloat16. One group.
//
// An operand with an infinity, a NaN or a value that rounds to an infinite first part has no such parts; then nothing
// is promised about the result, and the caller computes it otherwise.
#pragma once

#include "../parallel.h"
#include "direct_grad_input.h"
#include "split_source.h"
#include "split_weight.h"
#include "store_target.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

template <typename Unit, typename S, int Parts>
class SplitTask {
  public:
    SplitTask(const Gather& gather, const SplitPlan& plan, int64_t task)
        : gather_(gather), plan_(plan), source_(gather, plan) {
        const Tiling& tiling = plan.tiling;
        const int64_t tile = task % tiling.count(), groups = ceil_divide(plan.blocks, plan.blocks_a_task);
        first_block_ = task / tiling.count() % groups * plan.blocks_a_task;
        blocks_ = smaller(plan.blocks_a_task, plan.blocks - first_block_);
        from_.sample = task / tiling.count() / groups * plan.samples;
        samples_ = smaller(plan.samples, gather.batch - from_.sample);
        to_.width = SplitPlan::kColumns;
        from_.width = plan.chunk;
        const int64_t index[3] = {tile / tiling.tiles[2] / tiling.tiles[1], tile / tiling.tiles[2] % tiling.tiles[1],
                                  tile % tiling.tiles[2]};
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t outputs = tiling.axis[axis].tile * plan.outputs(axis);
            to_.first[axis] = index[axis] * outputs;
            to_.count[axis] = smaller(outputs, gather.axis[axis].count - to_.first[axis]);
            tiles_[axis] = ceil_divide(to_.count[axis], plan.outputs(axis));
            from_.origin[axis] = gather.axis[axis].source_start + to_.first[axis] * gather.axis[axis].source_step;
        }
        parts_ = scratch<Bfloat16>(Scratch::tile_input, Parts * plan.part_values());
        sums_ = scratch<float>(Scratch::tile_accumulators, (plan.chunks == 1 ? 1 : blocks_) * block_sums());
        rows_ = scratch<int32_t>(Scratch::tile_lists, plan.sums_rows() / kTileRows);
        list_rows();
    }

    // `initial`: what the sums of a voxel start from, and as many zeros. Returns whether the source can be split.
    bool run(const S* source, const Bfloat16* weights, const float* initial, S* target) {
        bool splits = true;
        for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
            from_.channel = chunk * plan_.chunk;
            from_.channels = smaller(plan_.chunk, gather_.source_channels - from_.channel);
            if (plan_.steps() > 0) splits &= source_.pack(from_, samples_, source, parts_);
            for (int64_t block = 0; block < blocks_; ++block) {
                compute_block(chunk, first_block_ + block, weights, initial, target);
            }
        }
        return splits;
    }

  private:
    int64_t heights() const { return plan_.flat ? 1 : tiles_[1]; }
    int64_t panel_tiles() const { return ceil_divide(plan_.panel_rows(tiles_[1], tiles_[2]), kTileRows); }
    int64_t panels() const { return samples_ * tiles_[0] * heights(); }
    int64_t block_sums() const { return plan_.points() * plan_.sums_rows() * SplitPlan::kColumns; }

    // Where in a point's source each tile of rows begins.
    void list_rows() {
        const PackedAxis* packed = plan_.tiling.axis;
        int32_t* row = rows_;
        for (int64_t sample = 0; sample < samples_; ++sample) {
            for (int64_t d = 0; d < tiles_[0]; ++d) {
                for (int64_t h = 0; h < heights(); ++h) {
                    const int64_t panel = sample * plan_.sample_values() +
                                          d * packed[0].voxel_step * plan_.row_values(0) +
                                          h * packed[1].voxel_step * plan_.row_values(1);
                    for (int64_t i = 0; i < panel_tiles(); ++i) {
                        *row++ = static_cast<int32_t>(panel + i * kTileRows * packed[2].voxel_step * plan_.chunk);
                    }
                }
            }
        }
    }

    void compute_block(int64_t chunk, int64_t block, const Bfloat16* weights, const float* initial, S* target) {
        const int64_t columns = plan_.block_columns(block, gather_.target_channels);
        to_.channel = block * SplitPlan::kColumns;
        to_.channels = smaller(SplitPlan::kColumns, gather_.target_channels - to_.channel);
        TileProduct product = {};
        product.left_part = plan_.part_values();
        product.left_row = plan_.tiling.axis[2].voxel_step * plan_.chunk * static_cast<int64_t>(sizeof(Bfloat16));
        product.offsets = plan_.offsets;
        product.steps = plan_.steps();
        product.sums_row = SplitPlan::kColumns * static_cast<int64_t>(sizeof(float));
        float* sums = sums_ + (plan_.chunks == 1 ? 0 : (block - first_block_) * block_sums());
        for (int64_t point = 0; point < plan_.points(); ++point) {
            product.right = weights + block * plan_.block_weights() + chunk * plan_.chunk_weights(columns) +
                            point * plan_.steps() * plan_.step_weights(columns);
            // The second point is in both outputs of a tile: it brings the bias.
            const int64_t zeros = plan_.transformed < 0 || point == 1 ? 0 : plan_.blocks * SplitPlan::kColumns;
            const float* start = initial + zeros + block * SplitPlan::kColumns;
            compute_rows(product, columns, parts_ + point * plan_.point_values(), chunk == 0 ? start : nullptr,
                         sums + point * plan_.sums_rows() * SplitPlan::kColumns);
        }
        if (chunk + 1 == plan_.chunks) store(sums, target);
    }

    // `initial`: what the sums of every row start from, or null where they go on.
    void compute_rows(TileProduct& product, int64_t columns, const Bfloat16* source, const float* initial,
                      float* sums) {
        const int64_t tiles = panels() * panel_tiles();
        for (int64_t tile = 0; tile < tiles;) {
            const int64_t now = smaller(tiles - tile, 2);
            for (int64_t i = 0; i < now; ++i) product.left[i] = source + rows_[tile + i];
            product.sums = sums + tile * kTileRows * SplitPlan::kColumns;
            product.initial = initial != nullptr ? initial : product.sums;
            product.initial_row = initial != nullptr ? 0 : product.sums_row;
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

    void store(const float* sums, S* target) {
        float* combined = scratch<float>(Scratch::tile_rows, 2 * tiles_[2] * SplitPlan::kColumns);
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t plane = panel / heights(), row = panel % heights();
            to_.sample = from_.sample + plane / tiles_[0];
            for (int64_t h = 0; h < (plan_.flat ? tiles_[1] : 1); ++h) {
                const float* from = sums + h * plan_.pitch * SplitPlan::kColumns;
                const int64_t index[2] = {plane % tiles_[0], row + h};
                if (plan_.transformed < 0) {
                    store_row(index, from, target);
                } else {
                    combine_points(from, combined);
                    store_tiles(index, combined, target);
                }
            }
            sums += panel_tiles() * kTileRows * SplitPlan::kColumns;
        }
    }

    void store_row(const int64_t index[2], const float* sums, S* target) const {
        TargetBlock row = to_;
        row.count[0] = row.count[1] = 1;
        row.first[0] += index[0];
        row.first[1] += index[1];
        store_channels_last(gather_, row, sums, target);
    }

    void store_tiles(const int64_t tile[2], const float* outputs, S* target) const {
        for (int64_t i = 0; i < 2; ++i) {
            int64_t index[2] = {tile[0], tile[1]};
            index[plan_.transformed] = 2 * index[plan_.transformed] + i;
            if (index[plan_.transformed] == to_.count[plan_.transformed]) return;
            store_row(index, outputs + i * tiles_[2] * SplitPlan::kColumns, target);
        }
    }

    // to[output of the tile][voxel of a row][column].
    void combine_points(const float* sums, float* to) const {
        using V = Vector<float>;
        const int64_t stride = plan_.sums_rows() * SplitPlan::kColumns, values = tiles_[2] * SplitPlan::kColumns;
        for (int64_t i = 0; i < values; i += V::lanes) {
            const auto point = [&](int64_t index) { return V::load(sums + index * stride + i); };
            V::store(to + i, point(0) + point(1) + point(2));
            V::store(to + values + i, point(1) - point(2) - point(3));
        }
    }

    const Gather& gather_;
    const SplitPlan& plan_;
    SplitSource<S, Parts> source_;
    Unit unit_;
    int64_t first_block_, blocks_, samples_;
    int64_t tiles_[3];  // along each axis; a voxel is one where it is not transformed
    SourceBlock from_ = {};
    TargetBlock to_ = {};
    Bfloat16* parts_;
    float* sums_;
    int32_t* rows_;
};

// `bias` may be null. Returns whether operands could be split; if not, the result is to be computed otherwise.
template <typename Unit, int Parts, typename S>
bool split_gather(const Gather& gather, const S* source, const S* weight, const S* bias, S* target) {
    const SplitPlan plan = make_split_plan(gather, Parts);
    const int64_t weight_values = plan.blocks * plan.block_weights(), width = plan.blocks * SplitPlan::kColumns;
    float* initial = scratch<float>(Scratch::shared_weights, 2 * width + ceil_divide(weight_values, 2));
    Bfloat16* weights = reinterpret_cast<Bfloat16*>(initial + 2 * width);
    for (int64_t c = 0; c < 2 * width; ++c)
        initial[c] = bias != nullptr && c < gather.target_channels ? widen(bias[c]) : 0;
    bool splits = true;
    const auto note = [&](bool task_splits) {
        if (!task_splits) __atomic_store_n(&splits, false, __ATOMIC_RELAXED);
    };
    parallel_for(plan.blocks * plan.chunks, [&](int64_t task) {
        note(pack_split_weights<Parts>(gather, plan, weight, task / plan.chunks, task % plan.chunks, weights));
    });
    if (!splits) return false;
    parallel_for(plan.tasks(gather.batch), [&](int64_t task) {
        note(SplitTask<Unit, S, Parts>(gather, plan, task).run(source, weights, initial, target));
    });
    return splits;
}

template <typename Unit, int Parts, typename S>
bool split_forward(const ConvProblem& given, const S* x, const S* weight, const S* bias, S* y) {
    const ConvProblem problem = with_long_rows(given);
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    return split_gather<Unit, Parts>(gather, x, weight, bias, y);
}

template <typename Unit, int Parts, typename S>
bool split_grad_input(const ConvProblem& given, const S* grad_output, const S* weight, S* grad_input) {
    bool splits = true;
    for_each_residue(with_long_rows(given), [&](const Gather& gather) {
        splits = splits && split_gather<Unit, Parts, S>(gather, grad_output, weight, nullptr, grad_input);
    });
    return splits;
}

#endif

}  // namespace
}  // namespace pvc
