// Gradient of the input: one gather per residue of the input position modulo the stride (see gather.h), or matrix
// products where windows do not overlap.
#pragma once

#include "direct_gather.h"
#include "patch_product.h"

namespace pvc {
namespace {

// Calls body(gather) for every residue.
template <typename Body>
void for_each_residue(const ConvProblem& problem, const Body& body) {
    Gather gather = gather_channels(problem, false);
    for (int64_t d = 0; d < smaller(problem.stride[0], problem.input_size[0]); ++d) {
        gather.axis[0] = grad_input_axis(problem, 0, d);
        for (int64_t h = 0; h < smaller(problem.stride[1], problem.input_size[1]); ++h) {
            gather.axis[1] = grad_input_axis(problem, 1, h);
            for (int64_t w = 0; w < smaller(problem.stride[2], problem.input_size[2]); ++w) {
                gather.axis[2] = grad_input_axis(problem, 2, w);
                body(gather);
            }
        }
    }
}

template <typename T>
void direct_grad_input(const ConvProblem& given, const T* grad_output, const T* weight, T* grad_input) {
    const ConvProblem problem = with_long_rows(given);
    if (is_patch_product(problem, false)) {
        run_patch_product<T>(patch_product(problem, false), grad_output, weight, nullptr, grad_input);
        return;
    }
    for_each_residue(problem,
                     [&](const Gather& gather) { direct_gather<T>(gather, grad_output, weight, nullptr, grad_input); });
}

}  // namespace
}  // namespace pvc
