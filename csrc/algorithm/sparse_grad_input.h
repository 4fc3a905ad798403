// Gradient of the input behind a max-pool:
//
//   grad_input[i][ic] = sum over taps k and oc of  gradient[(i + padding - k * dilation) / stride][oc] * w[oc][k][ic]
//
// where few channels of a voxel have a gradient. A task owns a slab of input depths of one sample and group. It sorts
// the gradients that reach the slab by output voxel (a counting sort), then computes plane after plane of the input:
// for each output column (h_o, w_o), the gradients within reach along the depth, times the weights of all taps along
// the height and the width, are added to the few input voxels that the column reaches (microkernel/sparse_scatter.h;
// three taps along the width without stride or dilation go from column to column, microkernel/sparse_row.h). The
// plane is held in scratch memory, with room at its borders, and copied to its place row by row. Slabs sort what lies
// in their halo again, so no value has two writers.
//
// Voxels are sorted with the depth innermost: output depths d_o of one column then follow one another. Input depth d
// and output depth d_o meet in tap k_d = d + padding - d_o * stride (dilation 1), so an entry whose offset is that of
// its filter minus d_o * stride kernel planes serves every d, from a base that depends on d alone: the entries of all
// taps along the depth are one list. With a dilation each tap has a list of its own.
#pragma once

#include "../microkernel/sparse_scatter.h"
#include "sparse_gradient.h"
#include "window_grad_input.h"

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
          by_row_(4 * (ceil_divide(in_channels_, lanes) * lanes - in_channels_) <= in_channels_ &&
                  conv_.kernel_size[2] == kRowTaps && conv_.stride[2] == 1 && conv_.dilation[2] == 1),
          width_(by_row_ ? ceil_divide(in_channels_, lanes) * lanes : in_channels_),
          shape_(SegmentShape::of<T>(conv_, width_, conv_.dilation[2] == 1)),
          run_values_(shape_.pieces * shape_.vectors * lanes),
          kernel_row_(run_values_ * (shape_.joined ? 1 : conv_.kernel_size[2])),
          kernel_plane_(kernel_row_ * conv_.kernel_size[1]),
          entry_plane_(conv_.dilation[0] == 1 ? kernel_plane_ * conv_.stride[0] : 0),
          rows_(padded_size(1)),
          row_pitch_(padded_size(2) * width_) {
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

    // Gradients of output voxels first[a] .. first[a] + count[a] - 1 sorted by voxel, in the order height, width,
    // depth; those of voxel v are the entries starts[v] .. starts[v + 1] - 1.
    struct Sorted {
        int64_t first[3], count[3];
        int64_t pooled_first, pooled_last;  // windows along the depth
        int32_t* starts;
        SparseEntry<T>* entries;  // offsets in the packed weights
    };

    int64_t list_bytes(int64_t slab) const {
        const int64_t voxels = slab + (conv_.kernel_size[0] - 1) * conv_.dilation[0];
        const int64_t windows =
            smaller(ceil_divide(voxels, conv_.stride[0] * problem_.pool_stride[0]) + 1, problem_.pooled_size[0]);
        return windows * problem_.pooled_size[1] * problem_.pooled_size[2] * out_channels_ *
               static_cast<int64_t>(sizeof(SparseEntry<T>));
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
                to[tap / width * run_values_ + tap % width * width_ + c] =
                    filter[last ? tap * in_channels_ + c : c * taps + tap];
            }
        }
    }

    // Positions along an axis, from -padding on, that taps or the input reach.
    int64_t padded_size(int axis) const {
        const int64_t reach = (conv_.output_size[axis] - 1) * conv_.stride[axis] +
                              (conv_.kernel_size[axis] - 1) * conv_.dilation[axis] + 1;
        return larger(reach, conv_.padding_begin[axis] + conv_.input_size[axis]);
    }

    void compute_slab(int64_t sample, int64_t group, int64_t first, const T* weights) const {
        const int64_t last = smaller(first + slab_, conv_.input_size[0]);
        const Sorted sorted = sort(sample, group, first, last);
        T* plane = scratch<T>(Scratch::tile_input, rows_ * row_pitch_ + lanes);
        for (int64_t d = first; d < last; ++d) {
            T* to = grad_input_ + sample * input_.sample + group * in_channels_ * input_.channel + d * input_.axis[0];
            add_plane(sorted, d, weights, plane, to);
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
        sorted.entries = scratch<SparseEntry<T>>(Scratch::tile_lists, most);
        sorted.starts = scratch<int32_t>(Scratch::tile_output, voxels + 3);

        // Zeros are counted and placed as of one voxel more. starts[v + 2] counts voxel v, then starts[v + 1] is where
        // the next entry of v goes: in the end its own end.
        std::memset(sorted.starts, 0, static_cast<size_t>(voxels + 3) * sizeof(int32_t));
        int32_t* next = sorted.starts + 1;
        const auto none = static_cast<int32_t>(voxels);
        for_each_gradient(sorted, sample, group,
                          [&](T gradient, int32_t voxel, int32_t) { ++next[1 + (nonzero(gradient) ? voxel : none)]; });
        for (int64_t v = 0; v < voxels; ++v) next[v + 1] += next[v];
        for_each_gradient(sorted, sample, group, [&](T gradient, int32_t voxel, int32_t offset) {
            sorted.entries[next[nonzero(gradient) ? voxel : none]++] = {gradient, offset};
        });
        return sorted;
    }

    // Calls visit(gradient, voxel, offset in the packed weights) for every pooled value, in nearly the order of voxels.
    template <typename Visit>
    void for_each_gradient(const Sorted& sorted, int64_t sample, int64_t group, const Visit& visit) const {
        const int64_t* stride = problem_.pool_stride;
        const int64_t step[3] = {1, sorted.count[2] * sorted.count[0], sorted.count[0]};
        const int64_t entry_step[3] = {-entry_plane_, 0, 0};
        const int32_t filter = static_cast<int32_t>(shape_.rows * run_values_);
        const int64_t channels = out_channels_, channel = pooled_.channel;
        int32_t code_voxels[256], code_planes[256];
        list_code_offsets(problem_, step, code_voxels);
        list_code_offsets(problem_, entry_step, code_planes);
        for (int64_t h = 0; h < problem_.pooled_size[1]; ++h) {
            for (int64_t w = 0; w < problem_.pooled_size[2]; ++w) {
                const int64_t column =
                    sample * pooled_.sample + group * channels * channel + h * pooled_.axis[1] + w * pooled_.axis[2];
                for (int64_t d = sorted.pooled_first; d <= sorted.pooled_last; ++d) {
                    const T* gradients = grad_ + column + d * pooled_.axis[0];
                    const uint8_t* codes = code_ + column + d * pooled_.axis[0];
                    const int64_t depth = (d - sorted.pooled_first) * stride[0];
                    const int32_t window =
                        static_cast<int32_t>(depth + h * stride[1] * step[1] + w * stride[2] * step[2]);
                    int32_t offset = static_cast<int32_t>(-depth * entry_plane_);
                    for (int64_t c = 0; c < channels; ++c, offset += filter) {
                        const uint8_t code = codes[c * channel];
                        visit(passed(gradients[c * channel], code), window + code_voxels[code],
                              offset + code_planes[code]);
                    }
                }
            }
        }
    }

    // Output depths that reach an input depth, as positions in `sorted`, and where their entries' offsets count from.
    struct Span {
        int64_t low, high, base;
    };

    // Fills `spans`, of at most as many as there are taps along the depth, and returns how many there are.
    int64_t list_spans(const Sorted& sorted, int64_t d, Span* spans) const {
        const int64_t kernel = conv_.kernel_size[0], stride = conv_.stride[0], shifted = d + conv_.padding_begin[0];
        const int64_t first = sorted.first[0], begin = larger(first, 0);
        const int64_t end = smaller(first + sorted.count[0], conv_.output_size[0]);
        int64_t count = 0;
        if (conv_.dilation[0] == 1) {
            const int64_t low = larger(ceil_divide(larger(shifted - kernel + 1, 0), stride), begin);
            const int64_t high = smaller(shifted / stride, end - 1);
            if (low <= high) {
                spans[count++] = {low - first, high - first, (shifted - first * stride) * kernel_plane_};
            }
            return count;
        }
        for (int64_t k = 0; k < kernel; ++k) {
            const int64_t position = shifted - k * conv_.dilation[0];
            const int64_t depth = position / stride;
            if (position < 0 || position % stride != 0 || depth < begin || depth >= end) continue;
            spans[count++] = {depth - first, depth - first, k * kernel_plane_};
        }
        return count;
    }

    // Sums the input plane d in `plane`, which begins at the position -padding, and copies its rows to `to`.
    void add_plane(const Sorted& sorted, int64_t d, const T* weights, T* plane, T* to) const {
        Span* spans = scratch<Span>(Scratch::tile_rows, conv_.kernel_size[0]);
        const int64_t count = list_spans(sorted, d, spans);
        const int64_t stride = conv_.stride[1], reach = (conv_.kernel_size[1] - 1) * conv_.dilation[1] + 1;
        const int64_t first = larger(sorted.first[1], 0);
        const int64_t last = smaller(sorted.first[1] + sorted.count[1], conv_.output_size[1]);
        int64_t cleared = 0, copied = 0;
        const auto clear_to = [&](int64_t row) {
            if (row > cleared) fill_zero(plane + cleared * row_pitch_, (row - cleared) * row_pitch_);
            cleared = larger(row, cleared);
        };
        const auto copy_to = [&](int64_t row) {
            clear_to(row);  // a stride beyond the kernel leaves rows out
            for (; copied < row; ++copied) {
                const int64_t h = copied - conv_.padding_begin[1];
                if (h < 0 || h >= conv_.input_size[1]) continue;
                copy_matrix(plane + copied * row_pitch_ + conv_.padding_begin[2] * width_, {width_, 1},
                            to + h * input_.axis[1], {input_.axis[2], input_.channel}, conv_.input_size[2],
                            in_channels_);
            }
        };
        for (int64_t h = first; h < last && count > 0; ++h) {
            clear_to(h * stride + reach);
            for (int64_t i = 0; i < count; ++i) add_columns(sorted, h, spans[i], weights, plane);
            copy_to(smaller((h + 1) * stride, rows_));
        }
        copy_to(rows_);
    }

    // Adds the entries of the output depths of `span` in the output row h, column by column.
    void add_columns(const Sorted& sorted, int64_t h, const Span& span, const T* weights, T* plane) const {
        const int64_t first = larger(sorted.first[2], 0);
        const int64_t last = smaller(sorted.first[2] + sorted.count[2], conv_.output_size[2]);
        const int32_t* starts =
            sorted.starts + ((h - sorted.first[1]) * sorted.count[2] + first - sorted.first[2]) * sorted.count[0];
        const int64_t kernel = conv_.kernel_size[1], now = even_part(kernel, scatter_segments(shape_.vectors));
        const int64_t pitch = conv_.dilation[1] * row_pitch_;
        if (by_row_) {
            const int64_t vectors = width_ / lanes;
            SparseRow<T> row = {};
            row.entries = sorted.entries;
            row.begins = starts + span.low;
            row.ends = starts + span.high + 1;
            row.list_pitch = sorted.count[0];
            row.count = last - first;
            row.weight_pitch = kernel_row_;
            row.row_pitch = pitch;
            row.voxel_pitch = width_;
            const int64_t rows = even_part(kernel, kRowSegments), part = even_part(vectors, kRowVectors);
            for (int64_t v = 0; v < vectors; v += part) {
                for (int64_t tap = 0; tap < kernel; tap += rows) {
                    row.weights = weights + span.base + tap * kernel_row_ + v * lanes;
                    row.sums = plane + h * conv_.stride[1] * row_pitch_ + tap * pitch + first * width_ + v * lanes;
                    sparse_row_kernel<T>(smaller(rows, kernel - tap), smaller(part, vectors - v))(row);
                }
            }
            return;
        }
        for (int64_t k = 0; k < kernel_row_ / run_values_; ++k) {
            for (int64_t piece = 0; piece < shape_.pieces; ++piece) {
                const int64_t begin = piece * shape_.vectors * lanes;
                const int64_t values = smaller(shape_.vectors * lanes, shape_.length - begin);
                for (int64_t tap = 0; tap < kernel; tap += now) {
                    const int64_t taps = smaller(now, kernel - tap);
                    const ScatterKernel<T> add = scatter_kernel<T>(taps, ceil_divide(values, lanes));
                    int32_t segments[kScatterSegments];
                    for (int64_t s = 0; s < taps; ++s) {
                        segments[s] =
                            static_cast<int32_t>(span.base + (tap + s) * kernel_row_ + k * run_values_ + begin);
                    }
                    T* sums =
                        plane + h * conv_.stride[1] * row_pitch_ + tap * pitch + k * conv_.dilation[2] * width_ + begin;
                    for (int64_t w = first; w < last; ++w) {
                        const int32_t* column = starts + (w - first) * sorted.count[0];
                        const int32_t from = column[span.low], size = column[span.high + 1] - from;
                        if (size == 0) continue;
                        const EntryList<T> list = {sorted.entries + from, size};
                        add(list, weights, segments, sums + w * conv_.stride[2] * width_, pitch,
                            (values - 1) % lanes + 1);
                    }
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
    const bool by_row_;                         // in whole vectors of channels, along rows
    const int64_t width_;  // channels of a voxel in `plane` and in the packed weights, those beyond in_channels_ zero
    const SegmentShape shape_;
    const int64_t run_values_;  // of one packed run: whole segments
    const int64_t kernel_row_;  // packed values of the taps along the width
    const int64_t kernel_plane_;
    const int64_t entry_plane_;       // what an entry's offset falls by from one output depth to the next
    const int64_t rows_, row_pitch_;  // of a plane of the input with its borders
    int64_t slab_;
};

template <typename T>
void sparse_grad_input(const PooledProblem& problem, const T* grad_pooled, const uint8_t* code, const T* weight,
                       T* grad_input) {
    if (WindowGradInput<T>::suits(problem)) {
        WindowGradInput<T>(problem, grad_pooled, code, grad_input).run(weight);
    } else {
        SparseGradInput<T>(problem, grad_pooled, code, grad_input).run(weight);
    }
}

}  // namespace
}  // namespace pvc
