// The input gradient for few input channels: any kernel, stride and dilation, one group (the caller checks).
//
// A vector of input channels would be nearly empty, and one of input voxels would be loaded again for every tap along
// the width. Here lanes are voxels of a row of grad_output, and each tap along the width and input channel is a column:
//
//     sums[kw, ic][ow] = sum over kd, kh, oc of  grad_output[oc][od][oh][ow] * w[oc][ic][kd][kh][kw]
//     grad_input[ic][ow * stride - padding + kw * dilation] += sums[kw, ic][ow]
//
// with the output rows od, oh that taps kd, kh of the input row meet. A task owns some input rows of some depths of one
// sample and goes through them depth by depth; the output rows it needs are packed planar, [row][channel][voxel], once
// for each depth, and stay in the cache until no further input depth meets them.
#pragma once

#include "../cache.h"
#include "../microkernel/row_products.h"
#include "../parallel.h"
#include "pack_source.h"

namespace pvc {
namespace {

template <typename T>
class FirstLayerGradInput {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes;

    FirstLayerGradInput(const ConvProblem& problem, const T* grad_output, T* grad_input)
        : problem_(problem),
          gather_(gather_channels(problem, false)),
          grad_output_(grad_output),
          grad_input_(grad_input),
          channels_(problem.out_channels),
          pitch_(ceil_divide(problem.output_size[2], lanes) * lanes),
          columns_(problem.kernel_size[2] * problem.in_channels),
          groups_(columns_, kMostColumns) {
        for (int a = 0; a < 3; ++a) gather_.axis[a] = grad_input_axis(problem, a, 0);
        planes_ = (problem.kernel_size[0] - 1) * problem.dilation[0] / problem.stride[0] + 1;
        const int64_t row_bytes = planes_ * row_values() * static_cast<int64_t>(sizeof(T));
        // Output rows of a depth that fit into the cache, and the input rows that meet no others.
        const int64_t fitting = larger(kL2Bytes, l2_bytes() / 2) / row_bytes;
        const int64_t reach = (problem.kernel_size[1] - 1) * problem.dilation[1];
        heights_ = smaller(larger((fitting - 1) * problem.stride[1] - reach, 1), problem.input_size[1]);
        heights_ = ceil_divide(problem.input_size[1], ceil_divide(problem.input_size[1], heights_));
        height_blocks_ = ceil_divide(problem.input_size[1], heights_);
        depths_ = problem.input_size[0];
        while (depths_ > kFewestDepths * planes_ &&
               problem.batch * height_blocks_ * ceil_divide(problem.input_size[0], depths_) < kTasks) {
            depths_ = ceil_divide(depths_, 2);
        }
        depth_blocks_ = ceil_divide(problem.input_size[0], depths_);
    }

    void run(const T* weight) const {
        T* packed = scratch<T>(Scratch::shared_weights, taps() * channels_ * columns_);
        pack_weights(weight, packed);
        parallel_for(problem_.batch * depth_blocks_ * height_blocks_, [&](int64_t task) {
            const int64_t height = task % height_blocks_ * heights_;
            const int64_t depth = task / height_blocks_ % depth_blocks_ * depths_;
            Rows rows(*this, task / height_blocks_ / depth_blocks_, height);
            for (int64_t d = depth; d < smaller(depth + depths_, problem_.input_size[0]); ++d) {
                for (int64_t h = height; h < smaller(height + heights_, problem_.input_size[1]); ++h) {
                    compute_row(rows, d, h, packed);
                }
            }
        });
    }

  private:
    static constexpr int64_t kTasks = 16, kFewestDepths = 4;

    int64_t taps() const { return problem_.kernel_size[0] * problem_.kernel_size[1]; }
    int64_t row_values() const { return channels_ * pitch_; }

    // The output position that input position `position` meets with a tap, or -1.
    int64_t met(int axis, int64_t position, int64_t tap) const {
        const int64_t shifted = position + problem_.padding_begin[axis] - tap * problem_.dilation[axis];
        if (shifted < 0 || shifted % problem_.stride[axis] != 0) return -1;
        const int64_t output = shifted / problem_.stride[axis];
        return output < problem_.output_size[axis] ? output : -1;
    }

    // The output rows of a task that are packed at a time: a ring of depths.
    class Rows {
      public:
        Rows(const FirstLayerGradInput& all, int64_t sample, int64_t height) : all_(all), sample_(sample) {
            const ConvProblem& problem = all.problem_;
            const int64_t last = smaller(height + all.heights_, problem.input_size[1]) - 1;
            const int64_t reach = (problem.kernel_size[1] - 1) * problem.dilation[1];
            const int64_t shift = problem.padding_begin[1], stride = problem.stride[1];
            first_ = larger(height + shift - reach, 0) / stride;
            rows_ = smaller((last + shift) / stride, problem.output_size[1] - 1) - first_ + 1;
            rows_ = larger(rows_, 0);
            values_ = scratch<T>(Scratch::tile_input, all.planes_ * rows_ * all.row_values());
            depth_ = scratch<int64_t>(Scratch::tables, all.planes_);
            for (int64_t i = 0; i < all.planes_; ++i) depth_[i] = -1;
        }

        int64_t sample() const { return sample_; }

        const T* row(int64_t depth, int64_t height) {
            const int64_t place = depth % all_.planes_;
            T* plane = values_ + place * rows_ * all_.row_values();
            if (depth_[place] != depth) {
                for (int64_t h = 0; h < rows_; ++h)
                    all_.pack_row(sample_, depth, first_ + h, plane + h * all_.row_values());
                depth_[place] = depth;
            }
            return plane + (height - first_) * all_.row_values();
        }

      private:
        const FirstLayerGradInput& all_;
        int64_t sample_, first_, rows_;
        T* values_;
        int64_t* depth_;
    };

    void pack_row(int64_t sample, int64_t depth, int64_t height, T* to) const {
        const PackedAxis one = {1, 1, 1, 1, true}, packed[3] = {one, one, {pitch_, pitch_, 1, 1, true}};
        SourceBlock block = {};
        block.sample = sample;
        block.channels = block.width = channels_;
        block.origin[0] = depth;
        block.origin[1] = height;
        pack_source(gather_, packed, true, block, grad_output_, to);
    }

    // [group of columns][tap along depth and height][output channel][column]
    void pack_weights(const T* weight, T* to) const {
        for (int64_t group = 0; group < groups_.parts; ++group) {
            for (int64_t tap = 0; tap < taps(); ++tap) {
                const int64_t* kernel = problem_.kernel_size;
                const T* from = weight + tap / kernel[1] * gather_.weight_tap_stride[0] +
                                tap % kernel[1] * gather_.weight_tap_stride[1];
                for (int64_t c = 0; c < channels_; ++c, from += gather_.weight_source_stride) {
                    for (int64_t k = 0; k < groups_.size(group); ++k) {
                        const int64_t column = groups_.start(group) + k;
                        *to++ = from[column / problem_.in_channels * gather_.weight_tap_stride[2] +
                                     column % problem_.in_channels * gather_.weight_target_stride];
                    }
                }
            }
        }
    }

    void compute_row(Rows& rows, int64_t depth, int64_t height, const T* weights) const {
        const int64_t *kernel = problem_.kernel_size, width = problem_.input_size[2];
        SourceRow<T>* met_rows = scratch<SourceRow<T>>(Scratch::tile_lists, taps());
        int64_t* met_taps = scratch<int64_t>(Scratch::tile_codes, taps());
        RowProducts<T> products = {met_rows, 0, channels_, pitch_,
                                   scratch<T>(Scratch::tile_accumulators, columns_ * pitch_)};
        for (int64_t tap = 0; tap < taps(); ++tap) {
            const int64_t od = met(0, depth, tap / kernel[1]), oh = met(1, height, tap % kernel[1]);
            if (od < 0 || oh < 0) continue;
            met_rows[products.count].values = rows.row(od, oh);
            met_taps[products.count++] = tap;
        }
        T* sums = products.sums;
        for (int64_t group = 0; group < groups_.parts; ++group) {
            const int64_t size = groups_.size(group);
            for (int64_t i = 0; i < products.count; ++i) {
                met_rows[i].weights =
                    weights + groups_.start(group) * taps() * channels_ + met_taps[i] * channels_ * size;
            }
            products.sums = sums + groups_.start(group) * pitch_;
            sum_rows<T>(size, products);
        }
        T* row = scratch<T>(Scratch::tile_rows, problem_.in_channels * width);
        for (int64_t c = 0; c < problem_.in_channels; ++c) {
            fill_zero(row + c * width, width);
            for (int64_t tap = 0; tap < kernel[2]; ++tap) {
                add_tap(sums + (tap * problem_.in_channels + c) * pitch_, tap, row + c * width);
            }
        }
        store_row(row, rows.sample(), depth, height);
    }

    // Adds the sums of a tap along the width to the input voxels that they belong to.
    void add_tap(const T* sums, int64_t tap, T* row) const {
        using V = Vector<T>;
        const int64_t stride = problem_.stride[2];
        const int64_t shift = tap * problem_.dilation[2] - problem_.padding_begin[2];  // input voxel of output voxel 0
        const int64_t first = shift < 0 ? ceil_divide(-shift, stride) : 0;
        const int64_t inside = problem_.input_size[2] > shift ? ceil_divide(problem_.input_size[2] - shift, stride) : 0;
        const int64_t end = smaller(inside, problem_.output_size[2]);
        int64_t o = first;
        if (stride == 1) {
            for (T* to = row + shift; o + lanes <= end; o += lanes)
                V::store(to + o, V::load(to + o) + V::load(sums + o));
        }
        for (; o < end; ++o) row[o * stride + shift] += sums[o];
    }

    void store_row(const T* row, int64_t sample, int64_t depth, int64_t height) const {
        const int64_t *size = problem_.input_size, channels = problem_.in_channels, width = size[2];
        const int64_t voxels = size[0] * size[1] * width, voxel = (depth * size[1] + height) * width;
        T* to = grad_input_ + sample * channels * voxels;
        if (problem_.layout == Layout::ndhwc) {
            transpose(row, width, to + voxel * channels, channels, channels, width);
        } else {
            for (int64_t c = 0; c < channels; ++c) copy_values(row + c * width, to + c * voxels + voxel, width);
        }
    }

    ConvProblem problem_;
    Gather gather_;
    const T* grad_output_;
    T* grad_input_;
    int64_t channels_, pitch_, columns_;
    EvenCut groups_;  // of the columns
    int64_t planes_;  // of output depths that an input depth meets
    int64_t heights_, height_blocks_, depths_, depth_blocks_;
};

template <typename T>
void first_layer_grad_input(const ConvProblem& given, const T* grad_output, const T* weight, T* grad_input) {
    const ConvProblem problem = with_long_rows(given);
    FirstLayerGradInput<T>(problem, grad_output, grad_input).run(weight);
}

}  // namespace
}  // namespace pvc
