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
    // What forward reads may be in another layout than what it writes; gathers alone (gather.h) look at these.
    Layout source_layout, weight_layout;
};

enum class Activation { none, relu, leaky_relu, silu, gelu, gelu_tanh };

// A convolution whose output goes through an activation and a max-pool without being stored. Window p of an axis covers
// the output voxels p * pool_stride - pool_padding + [0, pool_window), those outside of the output left out; every
// window has at least one voxel and at most 255 in all. A code is the index (d * window_h + h) * window_w + w of a
// voxel inside the whole window, or kNoVoxel: behind a ReLU, a window without a positive value (or NaN) chooses none,
// because no gradient passes through it.
constexpr uint8_t kNoVoxel = 255;

struct PooledProblem {
    ConvProblem conv;
    Activation activation;
    double negative_slope;
    int64_t pool_window[3];
    int64_t pool_stride[3];
    int64_t pool_padding[3];
    int64_t pooled_size[3];
};

}  // namespace pvc
