// Forward pass: one gather.
#pragma once

#include "direct_gather.h"

namespace pvc {
namespace {

template <typename T>
void direct_forward(const ConvProblem& problem, const T* x, const T* weight, const T* bias, T* y) {
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    direct_gather(gather, x, weight, bias, y);
}

}  // namespace
}  // namespace pvc
