// Gathers that read the same source voxels as one plan: the residues of an input position modulo the stride, of which
// grad_input has one gather each (gather.h).
//
//     target[first + j * step] of residue r = sum over t of  source[start_r + j * source_step + t] * w[k_r(t)]
//
// Where target channels are few, all residues' are the columns of one product (`merged`): each has weights for all taps
// of the union, zero where it has none. Else each residue has products, and weights, of its own.
#pragma once

#include "split_plan.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

constexpr int64_t kMostResidues = 8;

// Those of one axis, and a gather with the taps of all.
struct ResidueAxis {
    int64_t count = 0;
    GatherAxis of[kMostResidues], all;

    // How far the taps of a residue begin behind the first of all.
    int64_t first(int64_t residue) const { return of[residue].source_start - all.source_start; }

    // Whether taps of the residues are neighbours, so that those of all are.
    bool unite() {
        all = of[0];
        int64_t begin = 0, end = 0;
        bool any = false;
        for (int64_t r = 0; r < count; ++r) {
            const GatherAxis& axis = of[r];
            if (axis.taps > 1 && axis.tap_step != 1) return false;
            if (axis.taps == 0) continue;
            begin = any ? smaller(begin, axis.source_start) : axis.source_start;
            end = any ? larger(end, axis.source_start + axis.taps) : axis.source_start + axis.taps;
            any = true;
        }
        all.source_start = begin;
        all.taps = end - begin;
        all.tap_step = 1;
        return any;
    }
};

struct Residues {
    Gather gather;  // but for its axes
    ResidueAxis axis[3];

    int64_t count() const { return axis[0].count * axis[1].count * axis[2].count; }
    int64_t index(int64_t depth, int64_t height, int64_t width) const {
        return (depth * axis[1].count + height) * axis[2].count + width;
    }
    // What one residue computes; along an axis where it is counted as -1, with the taps of all.
    Gather of(int64_t depth, int64_t height, int64_t width) const {
        Gather result = gather;
        const int64_t residue[3] = {depth, height, width};
        for (int a = 0; a < 3; ++a) result.axis[a] = residue[a] < 0 ? axis[a].all : axis[a].of[residue[a]];
        return result;
    }
    template <typename Body>
    void for_each(const Body& body) const {
        for (int64_t d = 0; d < axis[0].count; ++d) {
            for (int64_t h = 0; h < axis[1].count; ++h) {
                for (int64_t w = 0; w < axis[2].count; ++w) body(d, h, w);
            }
        }
    }
};

struct ResiduePlan {
    Residues residues;
    Gather source;  // of all taps; merged, with the target channels of all residues
    bool merged;
    SplitPlan all;  // tiling and chunks
    int64_t products;
    SplitPlan of[kMostResidues];         // of each product: steps and their offsets
    int64_t weights[kMostResidues + 1];  // where those of each product begin
    int64_t weight_channels;             // target channels of a product
};

// Whether one product with the columns of all residues takes no longer than one for each.
inline bool should_merge(const Residues& residues) {
    const int64_t targets = residues.gather.target_channels, columns = residues.count() * targets;
    if (columns > SplitPlan::kColumns) return false;
    int64_t taps = 0;
    residues.for_each([&](int64_t d, int64_t h, int64_t w) { taps += taps_of(residues.of(d, h, w)); });
    const auto tiles = [](int64_t count) { return ceil_divide(count, kTileRows); };
    return taps_of(residues.of(-1, -1, -1)) * tiles(columns) <= taps * tiles(targets);
}

// Weights of all residues with the taps of all, [residue][target channel][tap][source channel].
template <typename S>
const S* merge_weights(const Residues& residues, const S* weight) {
    const Gather& g = residues.gather;
    const Gather all = residues.of(-1, -1, -1);
    S* merged =
        scratch<S>(Scratch::shared_partials, residues.count() * g.target_channels * taps_of(all) * g.source_channels);
    S* to = merged;
    residues.for_each([&](int64_t rd, int64_t rh, int64_t rw) {
        const Gather one = residues.of(rd, rh, rw);
        const int64_t residue[3] = {rd, rh, rw};
        for (int64_t target = 0; target < g.target_channels; ++target) {
            for (int64_t tap = 0; tap < taps_of(all); ++tap) {
                const int64_t taps[3] = {tap / all.axis[2].taps / all.axis[1].taps,
                                         tap / all.axis[2].taps % all.axis[1].taps, tap % all.axis[2].taps};
                bool exists = true;
                const S* from = weight + target * g.weight_target_stride;
                for (int a = 0; a < 3; ++a) {
                    const int64_t own = taps[a] - residues.axis[a].first(residue[a]);
                    exists &= own >= 0 && own < one.axis[a].taps;
                    from += (one.axis[a].weight_first + own * one.axis[a].weight_step) * g.weight_tap_stride[a];
                }
                for (int64_t c = 0; c < g.source_channels; ++c) {
                    *to++ = exists ? from[c * g.weight_source_stride] : S{};
                }
            }
        }
    });
    return merged;
}

// The gather of merged weights.
inline Gather merged_gather(const Residues& residues) {
    Gather all = residues.of(-1, -1, -1);
    all.weight_source_stride = 1;
    all.weight_tap_stride[2] = all.source_channels;
    all.weight_tap_stride[1] = all.axis[2].taps * all.weight_tap_stride[2];
    all.weight_tap_stride[0] = all.axis[1].taps * all.weight_tap_stride[1];
    all.weight_target_stride = all.axis[0].taps * all.weight_tap_stride[0];
    all.target_channels *= residues.count();
    for (GatherAxis& axis : all.axis) {
        axis.weight_first = 0;
        axis.weight_step = 1;
    }
    return all;
}

inline void plan_residues(ResiduePlan& plan, int parts) {
    const Residues& residues = plan.residues;
    plan.merged = should_merge(residues);
    plan.source = plan.merged ? merged_gather(residues) : residues.of(-1, -1, -1);
    plan.products = plan.merged ? 1 : residues.count();
    plan.all = {};
    plan.all.parts = parts;
    plan.all.transformed = -1;
    plan.all.point = plan.source;
    int64_t weight_taps = 0;
    residues.for_each([&](int64_t d, int64_t h, int64_t w) { weight_taps += taps_of(residues.of(d, h, w)); });
    cut_into_tasks(plan.source, plan.all, plan.merged ? taps_of(plan.source) : weight_taps,
                   plan.merged ? 1 : residues.axis[2].count, plan.products);
    choose_panels(plan.all);
    int64_t steps = 1;
    int64_t begins = 0;
    const auto add = [&](int64_t product, const Gather& gather) {
        SplitPlan& of = plan.of[product] = plan.all;
        of.point = gather;
        cut_into_steps(of);
        plan.weights[product] = begins;
        begins += of.blocks * of.block_weights();
        steps += of.steps();
    };
    if (plan.merged) {
        add(0, plan.source);
    } else {
        residues.for_each([&](int64_t d, int64_t h, int64_t w) { add(residues.index(d, h, w), residues.of(d, h, w)); });
    }
    plan.weights[plan.products] = begins;
    int32_t* offsets = scratch<int32_t>(Scratch::tables, steps);
    const auto list = [&](int64_t product, const int64_t first[3]) {
        list_steps(plan.of[product], first, offsets);
        offsets += plan.of[product].steps();
    };
    if (plan.merged) {
        const int64_t first[3] = {};
        list(0, first);
    } else {
        residues.for_each([&](int64_t d, int64_t h, int64_t w) {
            const int64_t first[3] = {residues.axis[0].first(d), residues.axis[1].first(h), residues.axis[2].first(w)};
            list(residues.index(d, h, w), first);
        });
    }
}

#endif

}  // namespace
}  // namespace pvc
