// All residues of a plan (split_residue_plan.h) in one task: the source is packed and split once for all of them, with
// what the taps of any reach, and rows of results are whole again before they are stored.
#pragma once

#include "split_panels.h"
#include "split_residue_plan.h"
#include "split_source.h"
#include "split_weight.h"
#include "store_target.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

template <typename Unit, typename S, int Parts>
class ResidueTask {
  public:
    ResidueTask(const ResiduePlan& plan, int64_t task)
        : plan_(plan),
          place_(plan.source, plan.all, task),
          panels_(plan.all, place_),
          source_(plan.source, plan.all),
          from_(place_.source(plan.source, plan.all)) {
        parts_ = scratch<Bfloat16>(Scratch::tile_input, Parts * plan.all.part_values());
        const int64_t waiting = plan.merged ? 1 : widths();
        const int64_t kept = plan.all.chunks == 1 ? waiting : plan.products * place_.blocks;
        // A vector is read from the last column on.
        sums_ = scratch<float>(Scratch::tile_accumulators, kept * product_sums() + V::lanes);
        const int64_t row = place_.tiles[2] * plan.residues.axis[2].of[0].target_step;
        row_ = scratch<float>(Scratch::tile_rows, row * SplitPlan::kColumns);
    }

    // `zeros`: as many as columns of a block. `bias`: of all blocks. Returns whether the source can be split.
    bool run(const S* source, const Bfloat16* weights, const float* zeros, const float* bias, S* target) {
        const ResidueAxis* axis = plan_.residues.axis;
        bool splits = true;
        for (int64_t chunk = 0; chunk < plan_.all.chunks; ++chunk) {
            from_.channel = chunk * plan_.all.chunk;
            from_.channels = smaller(plan_.all.chunk, plan_.source.source_channels - from_.channel);
            splits &= source_.pack(from_, place_.samples, source, parts_);
            const bool last = chunk + 1 == plan_.all.chunks;
            for (int64_t block = 0; block < place_.blocks; ++block) {
                if (plan_.merged) multiply(0, 0, chunk, block, weights, zeros);
                for (int64_t d = 0; d < axis[0].count; ++d) {
                    for (int64_t h = 0; h < axis[1].count; ++h) {
                        for (int64_t w = 0; w < widths() && !plan_.merged; ++w) {
                            multiply(plan_.residues.index(d, h, w), w, chunk, block, weights, zeros);
                        }
                        if (last) store(d, h, block, bias, target);
                    }
                }
            }
        }
        return splits;
    }

  private:
    using V = Vector<float>;

    int64_t widths() const { return plan_.residues.axis[2].count; }
    int64_t product_sums() const { return plan_.all.sums_rows() * SplitPlan::kColumns; }

    // Of a product and a block, counted in the task; `width` is its residue along the width.
    float* sums_of(int64_t product, int64_t width, int64_t block) const {
        const int64_t index = plan_.all.chunks == 1 ? width : product * place_.blocks + block;
        return sums_ + index * product_sums();
    }

    void multiply(int64_t product, int64_t width, int64_t chunk, int64_t block, const Bfloat16* weights,
                  const float* zeros) {
        const SplitPlan& of = plan_.of[product];
        const int64_t of_all = place_.first_block + block;
        const int64_t columns = of.block_columns(of_all, plan_.source.target_channels);
        const Bfloat16* right =
            weights + plan_.weights[product] + of_all * of.block_weights() + chunk * of.chunk_weights(columns);
        panels_.multiply(of.steps(), of.offsets, columns, parts_, right, chunk == 0 ? zeros : nullptr,
                         sums_of(product, width, block));
    }

    // The rows of one residue of depth and height.
    void store(int64_t depth, int64_t height, int64_t block, const float* bias, S* target) {
        Gather gather = plan_.residues.of(depth, height, 0);
        const int64_t step = gather.axis[2].target_step;
        TargetBlock to = {};
        to.width = SplitPlan::kColumns;
        to.channel = plan_.merged ? 0 : (place_.first_block + block) * SplitPlan::kColumns;
        to.channels = smaller(SplitPlan::kColumns, gather.target_channels - to.channel);
        to.count[0] = to.count[1] = 1;
        to.first[2] = place_.first[2] * step;
        to.count[2] = smaller(place_.tiles[2] * step, gather.axis[2].target_size - to.first[2]);
        const float* all = sums_of(plan_.residues.index(depth, height, 0) * !plan_.merged, 0, block);
        gather.axis[2].target_step = 1;
        panels_.for_each_row(all, [&](int64_t sample, int64_t d, int64_t h, const float* from) {
            to.sample = sample;
            to.first[0] = place_.first[0] + d;
            to.first[1] = place_.first[1] + h;
            if (to.first[0] >= gather.axis[0].count || to.first[1] >= gather.axis[1].count) return;
            interleave(plan_.residues.index(depth, height, 0), block, from - all, to.channels, bias + to.channel);
            store_channels_last(gather, to, row_, target);
        });
    }

    // The bias is added to whole sums, and so rounded as if that were done afterwards.
    //
    // row_[voxel][column]: voxels of the residues along the width in turns, from a row of sums `offset` behind the
    // first.
    void interleave(int64_t first, int64_t block, int64_t offset, int64_t channels, const float* bias) {
        const int64_t step = plan_.residues.axis[2].of[0].target_step;
        for (int64_t w = 0; w < widths(); ++w) {
            const float* from =
                plan_.merged ? sums_ + offset + (first + w) * channels : sums_of(first + w, w, block) + offset;
            float* to = row_ + w * SplitPlan::kColumns;
            for (int64_t voxel = 0; voxel < place_.tiles[2]; ++voxel) {
                for (int64_t c = 0; c < channels; c += V::lanes)
                    V::store(to + c, V::load(from + c) + V::load(bias + c));
                from += SplitPlan::kColumns;
                to += step * SplitPlan::kColumns;
            }
        }
    }

    const ResiduePlan& plan_;
    SplitPlace place_;
    SplitPanels<Unit, Parts> panels_;
    SplitSource<S, Parts> source_;
    SourceBlock from_;
    Bfloat16* parts_;
    float *sums_, *row_;
};

// `bias` may be null. Returns whether operands could be split; if not, the result is to be computed otherwise.
template <typename Unit, int Parts, typename S>
bool split_residues(ResiduePlan& plan, const S* source, const S* weight, const S* bias, S* target) {
    plan_residues(plan, Parts);
    const SplitPlan& all = plan.all;
    const int64_t width = all.blocks * SplitPlan::kColumns;
    float* zeros = scratch<float>(Scratch::shared_weights,
                                  SplitPlan::kColumns + width + ceil_divide(plan.weights[plan.products], 2));
    float* biases = zeros + SplitPlan::kColumns;
    Bfloat16* weights = reinterpret_cast<Bfloat16*>(biases + width);
    for (int64_t c = 0; c < SplitPlan::kColumns; ++c) zeros[c] = 0;
    for (int64_t c = 0; c < width; ++c) {
        biases[c] = bias != nullptr && c < plan.residues.gather.target_channels ? widen(bias[c]) : 0;
    }
    if (plan.merged) weight = merge_weights(plan.residues, weight);
    bool splits = true;
    const auto note = [&](bool task_splits) {
        if (!task_splits) __atomic_store_n(&splits, false, __ATOMIC_RELAXED);
    };
    const int64_t pieces = all.blocks * all.chunks;
    parallel_for(plan.products * pieces, [&](int64_t task) {
        const int64_t product = task / pieces, piece = task % pieces;
        note(pack_split_weights<Parts>(plan.of[product].point, plan.of[product], weight, piece / all.chunks,
                                       piece % all.chunks, weights + plan.weights[product]));
    });
    if (!splits) return false;
    parallel_for(all.tasks(plan.source.batch), [&](int64_t task) {
        note(ResidueTask<Unit, S, Parts>(plan, task).run(source, weights, zeros, biases, target));
    });
    return splits;
}

#endif

}  // namespace
}  // namespace pvc
