// Forward pass: one gather, or one matrix product where windows do not overlap.
#pragma once

#include "direct_gather.h"
#include "patch_product.h"

namespace pvc {
namespace {

template <typename T>
void direct_forward(const ConvProblem& given, const T* x, const T* weight, const T* bias, T* y) {
    const ConvProblem problem = with_long_rows(given);
    if (is_patch_product(problem, true)) {
        run_patch_product(patch_product(problem, true), x, weight, bias, y);
        return;
    }
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    direct_gather(gather, x, weight, bias, y);
}

}  // namespace
}  // namespace pvc
