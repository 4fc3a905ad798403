// Gradient of the input: one gather per residue of the input position modulo the stride (see gather.h).
#pragma once

#include "direct_gather.h"

namespace pvc {
namespace {

template <typename T>
void direct_grad_input(const ConvProblem& problem, const T* grad_output, const T* weight, T* grad_input) {
    Gather gather = gather_channels(problem, false);
    for (int64_t d = 0; d < smaller(problem.stride[0], problem.input_size[0]); ++d) {
        gather.axis[0] = grad_input_axis(problem, 0, d);
        for (int64_t h = 0; h < smaller(problem.stride[1], problem.input_size[1]); ++h) {
            gather.axis[1] = grad_input_axis(problem, 1, h);
            for (int64_t w = 0; w < smaller(problem.stride[2], problem.input_size[2]); ++w) {
                gather.axis[2] = grad_input_axis(problem, 2, w);
                direct_gather<T>(gather, grad_output, weight, nullptr, grad_input);
            }
        }
    }
}

}  // namespace
}  // namespace pvc
