// Gradient of the input behind a ReLU or another activation and a max-pool of 2 x 2 x 2 windows that touch, for kernels
// of 3 x 3 x 3 without stride, dilation or groups:
//
//   grad_input[o + k - padding][ic] += gradient[o][oc] * w[oc][k][ic]     for each output voxel o that a window chose
//
// A task owns a slab of input depths of one sample. It goes through the output rows that reach it, voxel by voxel
// (microkernel/sparse_voxel.h), and adds up three planes of the input at a time in scratch memory, with room at their
// borders; a plane that no further output depth reaches is copied to its place. Rows at the borders of a slab are
// computed by both slabs, so no value has two writers. A vector of input channels at a time, so that their weights stay
// in the first-level cache.
#pragma once

#include "../microkernel/sparse_voxel.h"
#include "pool_store.h"

namespace pvc {
namespace {

template <typename T>
class WindowGradInput {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes, half_lanes = kHalfVectors ? lanes / 2 : lanes;

    // Whether there are registers for it and few lanes are left idle. In ncdhw, where its results are transposed,
    // sorting is a tenth faster.
    static bool suits(const PooledProblem& problem) {
        const ConvProblem& conv = problem.conv;
        for (int a = 0; a < 3; ++a) {
            if (conv.kernel_size[a] != 3 || conv.stride[a] != 1 || conv.dilation[a] != 1) return false;
            if (problem.pool_window[a] != 2 || problem.pool_stride[a] != 2 || problem.pool_padding[a] != 0)
                return false;
        }
        const int64_t idle = ceil_divide(conv.in_channels, half_lanes) * half_lanes - conv.in_channels;
        return kVectorRegisters == 32 && conv.groups == 1 && conv.layout == Layout::ndhwc &&
               4 * idle <= conv.in_channels;
    }

    WindowGradInput(const PooledProblem& problem, const T* grad, const uint8_t* code, T* grad_input)
        : problem_(problem),
          conv_(problem.conv),
          grad_(grad),
          code_(code),
          grad_input_(grad_input),
          pooled_(volume_strides(conv_.layout, conv_.out_channels, problem.pooled_size)),
          input_(volume_strides(conv_.layout, conv_.in_channels, conv_.input_size)),
          channels_(conv_.out_channels),
          words_(ceil_divide(channels_, kMaskChannels)),
          passes_(ceil_divide(conv_.in_channels, lanes)) {
        for (int a = 0; a < 3; ++a) {
            reached_[a] = smaller(conv_.output_size[a], 2 * problem.pooled_size[a]);
            size_[a] = larger(conv_.output_size[a] + 2, conv_.padding_begin[a] + conv_.input_size[a]);
        }
        slab_ = conv_.input_size[0];
        while (slab_ > 4 && conv_.batch * ceil_divide(conv_.input_size[0], slab_) < kTasks)
            slab_ = ceil_divide(slab_, 2);
    }

    void run(const T* weight) const {
        T* packed = scratch<T>(Scratch::shared_weights, passes_ * channels_ * 27 * lanes);
        for (int64_t pass = 0; pass < passes_; ++pass) pack_weights(pass, weight, packed);
        const int64_t slabs = ceil_divide(conv_.input_size[0], slab_);
        parallel_for(conv_.batch * slabs, [&](int64_t task) {
            for (int64_t pass = 0; pass < passes_; ++pass) {
                if (half(pass)) {
                    compute_slab<kHalfVectors>(task / slabs, task % slabs * slab_, pass, packed);
                } else {
                    compute_slab<false>(task / slabs, task % slabs * slab_, pass, packed);
                }
            }
        });
    }

  private:
    static constexpr int64_t kTasks = 16;

    int64_t pass_channels(int64_t pass) const { return smaller(lanes, conv_.in_channels - pass * lanes); }
    bool half(int64_t pass) const { return kHalfVectors && pass_channels(pass) <= half_lanes; }

    // [pass][output channel][tap][lane]
    void pack_weights(int64_t pass, const T* weight, T* packed) const {
        const int64_t width = half(pass) ? half_lanes : lanes, count = pass_channels(pass);
        const int64_t in_channels = conv_.in_channels;
        T* to = packed + pass * channels_ * 27 * lanes;
        fill_zero(to, channels_ * 27 * width);
        for (int64_t o = 0; o < channels_; ++o) {
            for (int64_t tap = 0; tap < 27; ++tap, to += width) {
                for (int64_t c = 0; c < count; ++c) {
                    const int64_t in = pass * lanes + c;
                    to[c] = weight[(o * 27 + tap) * in_channels + in];
                }
            }
        }
    }

    // Positions count from -padding on: output voxel o reaches the positions o .. o + 2.
    template <bool Half>
    void compute_slab(int64_t sample, int64_t first, int64_t pass, const T* packed) const {
        constexpr int64_t width = VectorPart<T, Half>::lanes;
        const int64_t last = smaller(first + slab_, conv_.input_size[0]), padding = conv_.padding_begin[0];
        VoxelRow<T> row = {};
        row.row_pitch = odd_lines(size_[2] * width);
        row.words = words_;
        row.count = reached_[2];
        row.weights = packed + pass * channels_ * 27 * lanes;
        const int64_t plane = row.row_pitch * size_[1];
        T* planes = scratch<T>(Scratch::tile_input, 3 * plane);
        fill_zero(planes, 3 * plane);
        uint64_t* masks = scratch<uint64_t>(Scratch::tile_lists, 2 * problem_.pooled_size[2] * words_);
        row.masks = masks;
        for (int64_t depth = first + padding - 2; depth < last + padding; ++depth) {
            T* of[3];
            for (int64_t k = 0; k < 3; ++k) of[k] = planes + (depth + k + 3) % 3 * plane;
            for (int64_t h = 0; depth >= 0 && depth < reached_[0] && h < reached_[1]; ++h) {
                list_row(sample, depth, h, row, masks);
                for (int k = 0; k < 3; ++k) row.sums[k] = of[k] + h * row.row_pitch;
                add_voxel_row<T, Half>(row);
            }
            if (depth >= first + padding) store_plane(sample, depth - padding, pass, of[0], row.row_pitch, width);
            fill_zero(of[0], plane);
        }
    }

    // The gradients of an output row, and which of them are whose.
    void list_row(int64_t sample, int64_t d, int64_t h, VoxelRow<T>& row, uint64_t* masks) const {
        const int64_t windows = problem_.pooled_size[2];
        const int64_t at = sample * pooled_.sample + d / 2 * pooled_.axis[0] + h / 2 * pooled_.axis[1];
        const T* gradients = grad_ + at;
        const uint8_t* codes = code_ + at;
        row.gradient_pitch = pooled_.axis[2];
        row.gradients = gradients;
        const int code = static_cast<int>(d % 2 * 4 + h % 2 * 2);
        for (int64_t w = 0; w < windows; ++w) {
            for (int64_t word = 0; word < words_; ++word) {
                const int64_t from = w * row.gradient_pitch + word * kMaskChannels;
                uint64_t chosen[2];
                list_chosen(gradients + from, codes + from, smaller(kMaskChannels, channels_ - word * kMaskChannels),
                            code, chosen);
                masks[2 * w * words_ + word] = chosen[0];
                masks[(2 * w + 1) * words_ + word] = chosen[1];
            }
        }
    }

    void store_plane(int64_t sample, int64_t d, int64_t pass, const T* plane, int64_t row_pitch, int64_t width) const {
        T* to = grad_input_ + sample * input_.sample + pass * lanes + d * input_.axis[0];
        const T* from = plane + conv_.padding_begin[1] * row_pitch + conv_.padding_begin[2] * width;
        for (int64_t h = 0; h < conv_.input_size[1]; ++h) {
            copy_matrix(from + h * row_pitch, {width, 1}, to + h * input_.axis[1], {input_.axis[2], 1},
                        conv_.input_size[2], pass_channels(pass));
        }
    }

    static int64_t odd_lines(int64_t values) {
        constexpr int64_t line = 64 / sizeof(T);
        return (ceil_divide(values, line) | 1) * line;
    }

    const PooledProblem& problem_;
    const ConvProblem& conv_;
    const T* grad_;
    const uint8_t* code_;
    T* grad_input_;
    const VolumeStrides pooled_, input_;
    const int64_t channels_, words_, passes_;  // output channels, words of their bits, vectors of input channels
    int64_t reached_[3];                       // output voxels that windows reach
    int64_t size_[3];                          // positions
    int64_t slab_;
};

}  // namespace
}  // namespace pvc
