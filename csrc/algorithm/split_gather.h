// Forward and grad_input on a matrix unit that multiplies bfloat16: direct convolution with operands split into parts
// (microkernel/tile_product.h, split_plan.h). Tensors of S: float, Float16 or Bfloat16. One group.
//
// An operand with an infinity, a NaN or a value that rounds to an infinite first part has no such parts; then nothing
// is promised about the result, and the caller computes it otherwise.
#pragma once

#include "../parallel.h"
#include "direct_grad_input.h"
#include "split_panels.h"
#include "split_residues.h"
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
        : gather_(gather),
          plan_(plan),
          place_(gather, plan, task),
          panels_(plan, place_),
          source_(gather, plan),
          from_(place_.source(gather, plan)) {
        to_.width = SplitPlan::kColumns;
        for (int axis = 0; axis < 3; ++axis) {
            to_.first[axis] = place_.first[axis];
            to_.count[axis] = place_.count[axis];
        }
        parts_ = scratch<Bfloat16>(Scratch::tile_input, Parts * plan.part_values());
        sums_ = scratch<float>(Scratch::tile_accumulators, (plan.chunks == 1 ? 1 : place_.blocks) * block_sums());
    }

    // `initial`: what the sums of a voxel start from, and as many zeros. Returns whether the source can be split.
    bool run(const S* source, const Bfloat16* weights, const float* initial, S* target) {
        bool splits = true;
        for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
            from_.channel = chunk * plan_.chunk;
            from_.channels = smaller(plan_.chunk, gather_.source_channels - from_.channel);
            if (plan_.steps() > 0) splits &= source_.pack(from_, place_.samples, source, parts_);
            for (int64_t block = 0; block < place_.blocks; ++block) {
                compute_block(chunk, place_.first_block + block, weights, initial, target);
            }
        }
        return splits;
    }

  private:
    int64_t block_sums() const { return plan_.points() * plan_.sums_rows() * SplitPlan::kColumns; }

    void compute_block(int64_t chunk, int64_t block, const Bfloat16* weights, const float* initial, S* target) {
        const int64_t columns = plan_.block_columns(block, gather_.target_channels);
        to_.channel = block * SplitPlan::kColumns;
        to_.channels = smaller(SplitPlan::kColumns, gather_.target_channels - to_.channel);
        float* sums = sums_ + (plan_.chunks == 1 ? 0 : (block - place_.first_block) * block_sums());
        for (int64_t point = 0; point < plan_.points(); ++point) {
            const Bfloat16* right = weights + block * plan_.block_weights() + chunk * plan_.chunk_weights(columns) +
                                    point * plan_.steps() * plan_.step_weights(columns);
            // The second point is in both outputs of a tile: it brings the bias.
            const int64_t zeros = plan_.transformed < 0 || point == 1 ? 0 : plan_.blocks * SplitPlan::kColumns;
            const float* start = initial + zeros + block * SplitPlan::kColumns;
            panels_.multiply(plan_.steps(), plan_.offsets, columns, parts_ + point * plan_.point_values(), right,
                             chunk == 0 ? start : nullptr, sums + point * plan_.sums_rows() * SplitPlan::kColumns);
        }
        if (chunk + 1 == plan_.chunks) store(sums, target);
    }

    void store(const float* sums, S* target) {
        float* combined = scratch<float>(Scratch::tile_rows, 2 * place_.tiles[2] * SplitPlan::kColumns);
        panels_.for_each_row(sums, [&](int64_t sample, int64_t depth, int64_t height, const float* from) {
            const int64_t index[2] = {depth, height};
            to_.sample = sample;
            if (plan_.transformed < 0) {
                store_row(index, from, target);
            } else {
                combine_points(from, combined);
                store_tiles(index, combined, target);
            }
        });
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
            store_row(index, outputs + i * place_.tiles[2] * SplitPlan::kColumns, target);
        }
    }

    // to[output of the tile][voxel of a row][column].
    void combine_points(const float* sums, float* to) const {
        using V = Vector<float>;
        const int64_t stride = plan_.sums_rows() * SplitPlan::kColumns;
        const int64_t values = place_.tiles[2] * SplitPlan::kColumns;
        for (int64_t i = 0; i < values; i += V::lanes) {
            const auto point = [&](int64_t index) { return V::load(sums + index * stride + i); };
            V::store(to + i, point(0) + point(1) + point(2));
            V::store(to + values + i, point(1) - point(2) - point(3));
        }
    }

    const Gather& gather_;
    const SplitPlan& plan_;
    SplitPlace place_;
    SplitPanels<Unit, Parts> panels_;
    SplitSource<S, Parts> source_;
    SourceBlock from_;
    TargetBlock to_ = {};
    Bfloat16* parts_;
    float* sums_;
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

// Whether all residues can be computed at once: few of them, neighbouring taps, and none that a transform makes
// cheaper.
inline bool find_residues(const ConvProblem& problem, int parts, Residues& residues) {
    residues.gather = gather_channels(problem, false);
    int64_t count = 1;
    for (int a = 0; a < 3; ++a) {
        ResidueAxis& axis = residues.axis[a];
        axis.count = smaller(problem.stride[a], problem.input_size[a]);
        count *= axis.count;
        if (count > kMostResidues || axis.count == 0) return false;
        for (int64_t r = 0; r < axis.count; ++r) axis.of[r] = grad_input_axis(problem, a, r);
        if (!axis.unite()) return false;
    }
    bool transformed = false;
    residues.for_each([&](int64_t d, int64_t h, int64_t w) {
        SplitPlan plan = {};
        plan.parts = parts;
        choose_transformed(residues.of(d, h, w), plan);
        transformed |= plan.transformed >= 0;
    });
    return count > 1 && !transformed;
}

// `bias`, of the input's channels, may be null; `adds_bias`: whether it was added.
template <typename Unit, int Parts, typename S>
bool split_grad_input(const ConvProblem& given, const S* grad_output, const S* weight, const S* bias, S* grad_input,
                      bool& adds_bias) {
    const ConvProblem problem = with_long_rows(given);
    ResiduePlan plan;
    adds_bias = find_residues(problem, Parts, plan.residues);
    if (adds_bias) {
        return split_residues<Unit, Parts>(plan, grad_output, weight, bias, grad_input);
    }
    bool splits = true;
    for_each_residue(problem, [&](const Gather& gather) {
        splits = splits && split_gather<Unit, Parts, S>(gather, grad_output, weight, nullptr, grad_input);
    });
    return splits;
}

#endif

}  // namespace
}  // namespace pvc
