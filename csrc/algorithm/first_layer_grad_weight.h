// The weight gradient for few input channels by F(2x2x2, 3x3x3): 3x3x3 kernels, stride and dilation 1, one group (the
// caller checks), at most kFirstLayerChannels input channels.
//
//     dW = G^T [ sum over tiles of (A dY) * (B^T x) ]            (winograd_axis.h)
//
// The source is packed and transformed as in the forward pass (first_layer_source.h); the gradients are read where they
// are and transformed in registers (microkernel/first_layer_products.h). Rows of them that are not whole, or not in the
// order of the vectors, are copied first. Every task adds slabs of its own, fixed by the problem alone, and the sums of
// the tasks are added in order.
//
// Where a result is not finite the whole gradient is computed again, directly, as in winograd_grad_weight.h.
#pragma once

#include "../microkernel/first_layer_products.h"
#include "direct_grad_weight.h"
#include "first_layer_slabs.h"

namespace pvc {
namespace {

constexpr int kFirstLayerChannels = 4;

template <typename T>
class FirstLayerGradWeight {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes;

    FirstLayerGradWeight(const ConvProblem& problem, const T* grad_output, const T* x)
        : problem_(problem),
          grad_output_(grad_output),
          x_(x),
          gather_(first_layer_gather(problem)),
          strides_(volume_strides(problem.layout, problem.out_channels, problem.output_size)),
          tiles_{ceil_divide(problem.output_size[0], 2), ceil_divide(problem.output_size[1], 2),
                 ceil_divide(problem.output_size[2], 2)},
          slabs_(tiles_, problem.batch, problem.in_channels * static_cast<int64_t>(sizeof(T))),
          blocks_(ceil_divide(problem.out_channels, lanes)),
          block_size_(problem.in_channels * kFirstLayerPoints * lanes) {}

    // Returns whether all results are finite.
    bool run(T* grad_weight) const {
        constexpr int64_t kSplits = 32;
        const int64_t slabs = problem_.batch * slabs_.count(), splits = smaller(slabs, kSplits);
        const int64_t size = blocks_ * block_size_;
        T* partials = scratch<T>(Scratch::shared_partials, splits * size);
        parallel_for(splits, [&](int64_t split) {
            T* sums = partials + split * size;
            std::memset(sums, 0, static_cast<size_t>(size) * sizeof(T));
            for (int64_t slab = split * slabs / splits; slab < (split + 1) * slabs / splits; ++slab) {
                add_slab(slabs_.slab(slab), sums);
            }
        });
        for (int64_t split = 1; split < splits; ++split) {
            for (int64_t i = 0; i < size; ++i) partials[i] += partials[split * size + i];
        }
        bool finite = true;
        for (int64_t block = 0; block < blocks_; ++block) {
            for (int64_t c = 0; c < problem_.in_channels; ++c) {
                const T* sums = partials + block * block_size_ + c * kFirstLayerPoints * lanes;
                finite = store(sums, c, block, grad_weight) && finite;
            }
        }
        return finite;
    }

  private:
    void add_slab(const FirstLayerSlab& slab, T* sums) const {
        FirstLayerSource<T> source(gather_, x_, slab);
        T* copy = scratch<T>(Scratch::tile_output, 4 * 2 * lanes * lanes);
        for (int64_t d = 0; d < slab.count[0]; ++d) {
            for (int64_t h = 0; h < slab.count[1]; ++h) {
                for (int64_t row = h == 0 ? 0 : 2 * h + 2; row < 2 * h + 4; ++row) source.transform_row(d, row);
                for (int64_t w = 0; w < slab.count[2]; w += lanes) {
                    const int64_t first[3] = {2 * (slab.first[0] + d), 2 * (slab.first[1] + h), 2 * w};
                    FirstLayerProducts<T> a = {};
                    a.source = source.points(2 * h, w / lanes);
                    a.tiles = smaller(lanes, slab.count[2] - w);
                    for (int64_t block = 0; block < blocks_; ++block) {
                        find_gradient(slab.sample, first, block, copy, a);
                        a.sums = sums + block * block_size_;
                        add(a);
                    }
                }
            }
        }
    }

    void add(const FirstLayerProducts<T>& a) const {
        if (problem_.in_channels == 1) add_first_layer_products<T, 1>(a);
        if (problem_.in_channels == 2) add_first_layer_products<T, 2>(a);
        if (problem_.in_channels == 3) add_first_layer_products<T, 3>(a);
        if (problem_.in_channels == 4) add_first_layer_products<T, 4>(a);
    }

    // The gradients of a row of tiles from voxel `first` on, in place or copied with zeros for those that do not exist.
    void find_gradient(int64_t sample, const int64_t first[3], int64_t block, T* copy, FirstLayerProducts<T>& a) const {
        const int64_t channels = smaller(lanes, problem_.out_channels - block * lanes);
        const T* from = grad_output_ + sample * strides_.sample + block * lanes * strides_.channel;
        int64_t count[3];
        for (int i = 0; i < 3; ++i) {
            from += first[i] * strides_.axis[i];
            count[i] = smaller(i == 2 ? 2 * a.tiles : 2, problem_.output_size[i] - first[i]);
        }
        const bool whole = channels == lanes && count[0] == 2 && count[1] == 2 && count[2] == 2 * a.tiles;
        if (whole && strides_.channel == 1) {
            a.gradient = from;
            for (int i = 0; i < 3; ++i) a.pitch[i] = strides_.axis[i];
            const bool row_ends = first[2] + count[2] == problem_.output_size[2];
            a.ahead = row_ends ? 2 * strides_.axis[1] - first[2] * strides_.axis[2] : 2 * lanes * strides_.axis[2];
            return;
        }
        a.gradient = copy;
        a.pitch[2] = lanes;
        a.pitch[1] = 2 * lanes * lanes;
        a.pitch[0] = 2 * a.pitch[1];
        a.ahead = 0;
        if (!whole) std::memset(copy, 0, static_cast<size_t>(2 * a.pitch[0]) * sizeof(T));
        for (int64_t d = 0; d < count[0]; ++d) {
            for (int64_t h = 0; h < count[1]; ++h) {
                copy_matrix(from + d * strides_.axis[0] + h * strides_.axis[1],
                            RowStrides{strides_.axis[2], strides_.channel}, copy + d * a.pitch[0] + h * a.pitch[1],
                            RowStrides{lanes, 1}, count[2], channels);
            }
        }
    }

    // The taps of one source channel and a vector of target channels; returns whether they are finite.
    bool store(const T* sums, int64_t source, int64_t block, T* grad_weight) const {
        using Axis = WinogradAxis<2>;
        typename Vector<T>::type v[kFirstLayerPoints];
        for (int i = 0; i < kFirstLayerPoints; ++i) v[i] = Vector<T>::load(sums + i * lanes);
        for (int i = 0; i < 16; ++i) Axis::weight_gradient(v + i, 16);
        for (int d = 0; d < 3; ++d) {
            for (int w = 0; w < 4; ++w) Axis::weight_gradient(v + d * 16 + w, 4);
            for (int h = 0; h < 3; ++h) Axis::weight_gradient(v + d * 16 + h * 4, 1);
        }
        T* to = grad_weight + source * gather_.weight_source_stride + block * lanes * gather_.weight_target_stride;
        const int64_t channels = smaller(lanes, problem_.out_channels - block * lanes);
        T spoilt = 0;
        for (int tap = 0; tap < 27; ++tap) {
            const int d = tap / 9, h = tap / 3 % 3, w = tap % 3;
            const int64_t place =
                d * gather_.weight_tap_stride[0] + h * gather_.weight_tap_stride[1] + w * gather_.weight_tap_stride[2];
            for (int64_t i = 0; i < channels; ++i) {
                const T value = v[d * 16 + h * 4 + w][i];
                to[place + i * gather_.weight_target_stride] = value;
                spoilt += value - value;
            }
        }
        return spoilt == 0;
    }

    const ConvProblem& problem_;
    const T* grad_output_;
    const T* x_;
    const Gather gather_;
    const VolumeStrides strides_;
    const int64_t tiles_[3];
    const FirstLayerSlabs slabs_;
    const int64_t blocks_, block_size_;
};

template <typename T>
void first_layer_grad_weight(const ConvProblem& problem, const T* grad_output, const T* x, T* grad_weight) {
    const FirstLayerGradWeight<T> pass(problem, grad_output, x);
    if (!pass.run(grad_weight)) direct_grad_weight(problem, grad_output, x, grad_weight);
}

}  // namespace
}  // namespace pvc
