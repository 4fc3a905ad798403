// Plain mirror of pyvolconv.problem.ConvProblem: the sizes of one 3-D convolution, no tensor, no torch.
#pragma once

#include <cstdint>

namespace pvc {

enum class Layout { ncdhw, ndhwc };

// Axis order of every triple: depth, height, width. Sizes are in elements.
struct ConvProblem {
    int64_t batch;
    int64_t in_channels;   // all groups together
    int64_t out_channels;  // all groups together
    int64_t input_size[3];
    int64_t output_size[3];
    int64_t kernel_size[3];
    int64_t stride[3];
    int64_t padding_begin[3];
    int64_t padding_end[3];
    int64_t dilation[3];
    int64_t groups;
    Layout layout;  // of activations and weights; an ndhwc weight is (C_out, K_d, K_h, K_w, C_in / groups)
};

}  // namespace pvc
