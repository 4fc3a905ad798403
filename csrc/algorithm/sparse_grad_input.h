// Gradient of the input behind a max-pool:
//
//   grad_input[i][ic] = sum over taps k and oc of  gradient[(i + padding - k * dilation) / stride][oc] * w[oc][k][ic]
//
// where few channels of a voxel have a gradient. A task owns a slab of input depths of one sample and group. It sorts
// the gradients that reach the slab by output voxel (a counting sort), then computes row after row of the input: for
// each tap along the depth and each output column, the gradients within reach along the height, times the weights of
// their kernel rows, are added to the few input voxels that the column reaches (microkernel/sparse_sum.h). The row is
// held in scratch memory, with room at both ends, and copied to its place once. Slabs sort what lies in their halo
// again, so no value has two writers.
//
// Voxels are sorted with the height innermost: output rows h_o of one column then follow one another. Input row h and
// output row h_o meet in tap k_h = h + padding - h_o * stride (dilation 1), so an entry whose offset is that of its
// filter minus h_o * stride kernel rows serves every h, from a base that depends on h alone: the entries of all taps
// along the height are one list. With a dilation each tap has a list of its own.
#pragma once

#include "sparse_gradient.h"

namespace pvc {
namespace {

inline int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_divide(-a, b); }

template <typename T>
class SparseGradInput {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes;

    SparseGradInput(const PooledProblem& problem, const T* grad, const uint8_t* code, T* grad_input)
        : problem_(problem),
          conv_(problem.conv),
          grad_(grad),
          code_(code),
          grad_input_(grad_input),
          pooled_(volume_strides(conv_.layout, conv_.out_channels, problem.pooled_size)),
          input_(volume_strides(conv_.layout, conv_.in_channels, conv_.input_size)),
          in_channels_(conv_.in_channels / conv_.groups),
          out_channels_(conv_.out_channels / conv_.groups),
          shape_(SegmentShape::of<T>(conv_, in_channels_, conv_.dilation[2] == 1)),
          run_values_(shape_.pieces * shape_.vectors * lanes),
          kernel_row_(run_values_ * (shape_.joined ? 1 : conv_.kernel_size[2])),
          entry_row_(conv_.dilation[1] == 1 ? kernel_row_ * conv_.stride[1] : 0) {
        slab_ = conv_.input_size[0];
        while (slab_ > 1 && (list_bytes(slab_) > kListBytes ||
                             conv_.batch * conv_.groups * ceil_divide(conv_.input_size[0], slab_) < kTasks)) {
            slab_ = ceil_divide(slab_, 2);
        }
    }

    void run(const T* weight) const {
        T* packed = scratch<T>(Scratch::shared_weights, conv_.out_channels * shape_.rows * run_values_);
        parallel_for(conv_.groups, [&](int64_t group) {
            for (int64_t o = 0; o < out_channels_; ++o) pack_filter(group * out_channels_ + o, weight, packed);
        });
        const int64_t slabs = ceil_divide(conv_.input_size[0], slab_);
        parallel_for(conv_.batch * conv_.groups * slabs, [&](int64_t task) {
            const int64_t group = task / slabs % conv_.groups, sample = task / slabs / conv_.groups;
            compute_slab(sample, group, task % slabs * slab_,
                         packed + group * out_channels_ * shape_.rows * run_values_);
        });
    }

  private:
    static constexpr int64_t kTasks = 16, kListBytes = kL2Bytes / 2;

    // Gradients of output voxels first[a] .. first[a] + count[a] - 1 sorted by voxel, in the order depth, width,
    // height; those of voxel v are the entries starts[v] .. starts[v + 1] - 1.
    struct Sorted {
        int64_t first[3], count[3];
        int64_t pooled_first, pooled_last;  // windows along the depth
        int32_t* starts;
        int32_t* offsets;  // in the packed weights
        T* values;
    };

    // The same entries in the order of the windows.
    struct Unsorted {
        int32_t* voxels;
        int32_t* offsets;
        T* values;
    };

    int64_t list_bytes(int64_t slab) const {
        const int64_t voxels = slab + (conv_.kernel_size[0] - 1) * conv_.dilation[0];
        const int64_t windows =
            smaller(ceil_divide(voxels, conv_.stride[0] * problem_.pool_stride[0]) + 1, problem_.pooled_size[0]);
        return windows * problem_.pooled_size[1] * problem_.pooled_size[2] * out_channels_ *
               static_cast<int64_t>(sizeof(T) + sizeof(int32_t));
    }

    // [row][run_values_], a run as in SegmentShape.
    void pack_filter(int64_t channel, const T* weight, T* packed) const {
        const int64_t* kernel = conv_.kernel_size;
        const int64_t taps = kernel[0] * kernel[1] * kernel[2], width = shape_.joined ? kernel[2] : 1;
        const T* filter = weight + channel * taps * in_channels_;
        T* to = packed + channel * shape_.rows * run_values_;
        fill_zero(to, shape_.rows * run_values_);
        for (int64_t tap = 0; tap < taps; ++tap) {
            for (int64_t c = 0; c < in_channels_; ++c) {
                const bool last = conv_.layout == Layout::ndhwc;
                to[tap / width * run_values_ + tap % width * in_channels_ + c] =
                    filter[last ? tap * in_channels_ + c : c * taps + tap];
            }
        }
    }

    void compute_slab(int64_t sample, int64_t group, int64_t first, const T* weights) const {
        const int64_t last = smaller(first + slab_, conv_.input_size[0]);
        const Sorted sorted = sort(sample, group, first, last);
        const int64_t reach =
            (conv_.output_size[2] - 1) * conv_.stride[2] + (conv_.kernel_size[2] - 1) * conv_.dilation[2] + 1;
        const int64_t voxels = larger(reach, conv_.padding_begin[2] + conv_.input_size[2]);
        T* row = scratch<T>(Scratch::tile_input, voxels * in_channels_ + lanes);
        for (int64_t d = first; d < last; ++d) {
            for (int64_t h = 0; h < conv_.input_size[1]; ++h) {
                fill_zero(row, voxels * in_channels_);
                add_row(sorted, d, h, weights, row);
                T* to = grad_input_ + sample * input_.sample + group * in_channels_ * input_.channel +
                        d * input_.axis[0] + h * input_.axis[1];
                copy_matrix(row + conv_.padding_begin[2] * in_channels_, {in_channels_, 1}, to,
                            {input_.axis[2], input_.channel}, conv_.input_size[2], in_channels_);
            }
        }
    }

    Sorted sort(int64_t sample, int64_t group, int64_t first, int64_t last) const {
        const int64_t* window = problem_.pool_window;
        const int64_t* stride = problem_.pool_stride;
        const int64_t begin = first + conv_.padding_begin[0], reach = (conv_.kernel_size[0] - 1) * conv_.dilation[0];
        const int64_t low = larger(-floor_divide(reach - begin, conv_.stride[0]), 0);
        const int64_t high = floor_divide(last - 1 + conv_.padding_begin[0], conv_.stride[0]);
        Sorted sorted = {};
        const int64_t pad = problem_.pool_padding[0];
        sorted.pooled_first = larger(-floor_divide(window[0] - 1 - pad - low, stride[0]), 0);
        sorted.pooled_last = smaller(floor_divide(high + pad, stride[0]), problem_.pooled_size[0] - 1);
        const int64_t windows[3] = {larger(sorted.pooled_last - sorted.pooled_first + 1, 0), problem_.pooled_size[1],
                                    problem_.pooled_size[2]};
        for (int a = 0; a < 3; ++a) {
            sorted.first[a] = (a == 0 ? sorted.pooled_first * stride[0] : 0) - problem_.pool_padding[a];
            sorted.count[a] = windows[a] == 0 ? 0 : (windows[a] - 1) * stride[a] + window[a];
        }
        const int64_t voxels = sorted.count[0] * sorted.count[1] * sorted.count[2];
        const int64_t most = windows[0] * windows[1] * windows[2] * out_channels_;
        sorted.values = scratch<T>(Scratch::tile_accumulators, 2 * most);
        sorted.starts = scratch<int32_t>(Scratch::tile_output, voxels + 2 + 3 * most);
        sorted.offsets = sorted.starts + voxels + 2;
        const Unsorted list = {sorted.offsets + most, sorted.offsets + 2 * most, sorted.values + most};

        // starts[v + 2] counts voxel v, then starts[v + 1] is where the next entry of v goes: in the end its own end.
        std::memset(sorted.starts, 0, static_cast<size_t>(voxels + 2) * sizeof(int32_t));
        int32_t* next = sorted.starts + 1;
        const int64_t count = list_gradients(sorted, sample, group, list, next + 1);
        for (int64_t v = 0; v < voxels; ++v) next[v + 1] += next[v];
        for (int64_t i = 0; i < count; ++i) {
            const int32_t entry = next[list.voxels[i]]++;
            sorted.offsets[entry] = list.offsets[i];
            sorted.values[entry] = list.values[i];
        }
        return sorted;
    }

    // Lists the non-zero gradients window by window and counts those of each voxel; returns how many there are.
    int64_t list_gradients(const Sorted& sorted, int64_t sample, int64_t group, const Unsorted& list,
                           int32_t* counts) const {
        const int64_t* stride = problem_.pool_stride;
        const int64_t step[3] = {sorted.count[1] * sorted.count[2], 1, sorted.count[1]};
        const int64_t entry_step[3] = {0, -entry_row_, 0};
        const int32_t filter = static_cast<int32_t>(shape_.rows * run_values_);
        const int64_t channels = out_channels_, channel = pooled_.channel;
        int32_t code_voxels[256], code_rows[256];
        list_code_offsets(problem_, step, code_voxels);
        list_code_offsets(problem_, entry_step, code_rows);
        int64_t length = 0;
        for (int64_t d = sorted.pooled_first; d <= sorted.pooled_last; ++d) {
            for (int64_t h = 0; h < problem_.pooled_size[1]; ++h) {
                const int64_t row =
                    sample * pooled_.sample + group * channels * channel + d * pooled_.axis[0] + h * pooled_.axis[1];
                const int64_t first = (d - sorted.pooled_first) * stride[0] * step[0] + h * stride[1] * step[1];
                for (int64_t w = 0; w < problem_.pooled_size[2]; ++w) {
                    const T* gradients = grad_ + row + w * pooled_.axis[2];
                    const uint8_t* codes = code_ + row + w * pooled_.axis[2];
                    const int32_t window = static_cast<int32_t>(first + w * stride[2] * step[2]);
                    int32_t offset = static_cast<int32_t>(-h * stride[1] * entry_row_);
                    for (int64_t c = 0; c < channels; ++c, offset += filter) {
                        const T gradient = gradients[c * channel];
                        const uint8_t code = codes[c * channel];
                        const int32_t voxel = window + code_voxels[code];
                        const bool listed = nonzero(gradient);
                        list.voxels[length] = voxel;
                        list.offsets[length] = offset + code_rows[code];
                        list.values[length] = gradient;
                        counts[voxel] += listed;
                        length += listed;
                    }
                }
            }
        }
        return length;
    }

    // The output position that tap k joins with input position i, or -1.
    int64_t output_position(const Sorted& sorted, int axis, int64_t i, int64_t k) const {
        const int64_t shifted = i + conv_.padding_begin[axis] - k * conv_.dilation[axis];
        if (shifted < 0 || shifted % conv_.stride[axis] != 0) return -1;
        const int64_t o = shifted / conv_.stride[axis];
        const bool inside =
            o < conv_.output_size[axis] && o >= sorted.first[axis] && o < sorted.first[axis] + sorted.count[axis];
        return inside ? o : -1;
    }

    // Adds everything that reaches the input row (d, h) to `row`, which begins at position -padding.
    void add_row(const Sorted& sorted, int64_t d, int64_t h, const T* weights, T* row) const {
        const int64_t kernel = conv_.kernel_size[1], stride = conv_.stride[1];
        for (int64_t kd = 0; kd < conv_.kernel_size[0]; ++kd) {
            const int64_t depth = output_position(sorted, 0, d, kd);
            if (depth < 0) continue;
            if (conv_.dilation[1] == 1) {
                const int64_t shifted = h + conv_.padding_begin[1];
                const int64_t low = larger(ceil_divide(larger(shifted - kernel + 1, 0), stride), sorted.first[1]);
                const int64_t high =
                    smaller(smaller(shifted / stride, conv_.output_size[1] - 1), sorted.first[1] + sorted.count[1] - 1);
                const int64_t base = (kd * kernel + shifted - sorted.first[1] * stride) * kernel_row_;
                if (low <= high) add_columns(sorted, depth, low, high, base, weights, row);
                continue;
            }
            for (int64_t kh = 0; kh < kernel; ++kh) {
                const int64_t height = output_position(sorted, 1, h, kh);
                if (height < 0) continue;
                add_columns(sorted, depth, height, height, (kd * kernel + kh) * kernel_row_, weights, row);
            }
        }
    }

    // Adds the entries of the output rows low .. high at `depth`, column by column; their offsets count from `base`.
    void add_columns(const Sorted& sorted, int64_t depth, int64_t low, int64_t high, int64_t base, const T* weights,
                     T* row) const {
        const int64_t first = larger(sorted.first[2], 0);
        const int64_t last = smaller(sorted.first[2] + sorted.count[2], conv_.output_size[2]);
        const int32_t* starts =
            sorted.starts + ((depth - sorted.first[0]) * sorted.count[2] + first - sorted.first[2]) * sorted.count[1] -
            sorted.first[1];
        for (int64_t k = 0; k < kernel_row_ / run_values_; ++k) {
            for (int64_t piece = 0; piece < shape_.pieces; ++piece) {
                const int64_t begin = piece * shape_.vectors * lanes;
                const int64_t values = smaller(shape_.vectors * lanes, shape_.length - begin);
                const SparseKernel<T> add = sparse_kernel<T>(1, ceil_divide(values, lanes));
                const int64_t kept = (values - 1) % lanes + 1;
                const int32_t segment = static_cast<int32_t>(base + k * run_values_ + begin);
                T* sums = row + k * conv_.dilation[2] * in_channels_ + begin;
                for (int64_t w = first; w < last; ++w) {
                    const int32_t* column = starts + (w - first) * sorted.count[1];
                    const int32_t from = column[low], count = column[high + 1] - from;
                    if (count == 0) continue;
                    const SparseList<T> list = {sorted.offsets + from, sorted.values + from, count};
                    add(list, weights, &segment, sums + w * conv_.stride[2] * in_channels_, kept);
                }
            }
        }
    }

    const PooledProblem& problem_;
    const ConvProblem& conv_;
    const T* grad_;
    const uint8_t* code_;
    T* grad_input_;
    const VolumeStrides pooled_, input_;
    const int64_t in_channels_, out_channels_;  // of a group
    const SegmentShape shape_;
    const int64_t run_values_;  // of one packed run: whole segments
    const int64_t kernel_row_;  // packed values of the taps along the width
    const int64_t entry_row_;   // what an entry's offset falls by from one output row to the next
    int64_t slab_;
};

template <typename T>
void sparse_grad_input(const PooledProblem& problem, const T* grad_pooled, const uint8_t* code, const T* weight,
                       T* grad_input) {
    SparseGradInput<T>(problem, grad_pooled, code, grad_input).run(weight);
}

}  // namespace
}  // namespace pvc
