// Forward and grad_input by dot products of bfloat16 pairs: direct convolution (direct_gather.h) that multiplies two
// source channels at a time. Tensors are bfloat16, or float32 whose values are rounded to bfloat16 as they are packed;
// sums are float32, rounded once where the result is bfloat16. One group.
#pragma once

#include "../parallel.h"
#include "compute_tile.h"
#include "direct_grad_input.h"
#include "pack_pairs.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// S is float or Bfloat16; `bias` may be null.
template <typename S>
void bfloat_gather(Gather gather, const S* source, const S* weight, const S* bias, S* target) {
    gather.paired_channels = gather.source_channels;
    gather.source_channels = ceil_divide(gather.paired_channels, 2);
    const Blocking<BfloatPair> b = choose_blocking<BfloatPair>(gather);
    BfloatPair* weights = scratch<BfloatPair>(Scratch::shared_weights, b.unit_weights() + b.unit_width());
    float* initial = reinterpret_cast<float*>(weights + b.unit_weights());
    for (int64_t c = 0; c < b.unit_width(); ++c) {
        initial[c] = bias != nullptr && c < b.unit_targets ? widen(bias[c]) : 0;
    }
    parallel_for(b.blocks, [&](int64_t block) { pack_weight_pairs(gather, b, block, weight, weights); });
    parallel_for(gather.batch * b.tiling.count(),
                 [&](int64_t task) { TileTask<BfloatPair, S>(gather, b, task).run(source, weights, initial, target); });
}

template <typename S>
void bfloat_forward(const ConvProblem& given, const S* x, const S* weight, const S* bias, S* y) {
    const ConvProblem problem = with_long_rows(given);
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    bfloat_gather(gather, x, weight, bias, y);
}

template <typename S>
void bfloat_grad_input(const ConvProblem& given, const S* grad_output, const S* weight, S* grad_input) {
    for_each_residue(with_long_rows(given),
                     [&](const Gather& gather) { bfloat_gather<S>(gather, grad_output, weight, nullptr, grad_input); });
}

#endif

}  // namespace
}  // namespace pvc
