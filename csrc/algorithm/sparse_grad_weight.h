// Gradient of the weight behind a max-pool:
//
//   grad_weight[oc][tap][ic] = sum over pooled voxels p of  grad_pooled[p][oc] * x[chosen(p, oc) * stride - padding +
//                              tap * dilation][ic]
//
// A unit is a chunk of output and of input channels of one group. For each tile of pooled voxels the window of x under
// it is packed with its channels innermost; then, run by run of a few pooled rows, each output channel gets the list of
// its non-zero gradients and sums the segments of x that they point at (microkernel/sparse_sum.h). What one run reads
// of x for a few segments, and the lists, stay in L1. A split is a range of tiles with sums of its own; the sums of all
// splits are added in order, so the result does not depend on the number of threads. Few input channels, which would
// leave lanes of a segment idle, have a kernel of their own (select_grad_weight.h).
#pragma once

#include "chosen_sum.h"
#include "select_grad_weight.h"
#include "sparse_gradient.h"

namespace pvc {
namespace {

template <typename T>
class SparseGradWeight {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes;

    SparseGradWeight(const PooledProblem& problem, const T* grad, const uint8_t* code, const T* x)
        : problem_(problem),
          conv_(problem.conv),
          grad_(grad),
          code_(code),
          x_(x),
          pooled_(volume_strides(conv_.layout, conv_.out_channels, problem.pooled_size)),
          gather_(gather_windows(problem)),
          in_chunk_(even_part(gather_.source_channels, kChannels)),
          out_chunk_(even_part(gather_.target_channels, 2 * kChannels)),
          in_chunks_(ceil_divide(gather_.source_channels, in_chunk_)),
          out_chunks_(ceil_divide(gather_.target_channels, out_chunk_)),
          units_(gather_.groups * in_chunks_ * out_chunks_) {
        const int64_t window_values = kL2Bytes * 3 / 8 / static_cast<int64_t>(sizeof(T));
        tiling_ = choose_tiling(gather_, {window_values / in_chunk_, INT32_MAX, gather_.batch * units_, 1});
        list_segments();
        int64_t step[3];
        for (int a = 0; a < 3; ++a) {
            step[a] = tiling_.axis[a].voxel_step * window_stride(a);
            cell_step_[a] = step[a] * problem.pool_stride[a];
        }
        list_code_offsets(problem, step, code_offsets_);
        row_run_ = even_part(tiling_.cells[1], larger(kRunVoxels / tiling_.cells[2], 1));
    }

    void run(T* grad_weight) const {
        const int64_t tiles = gather_.batch * tiling_.count();
        const SplitSums sums(units_, out_chunk_, segments_ * shape_.vectors * lanes, tiles, sizeof(T));
        sums.run<T>(
            tiles, [&](int64_t unit, int64_t first, int64_t last, T* to) { sum_tiles(unit_of(unit), first, last, to); },
            [&](int64_t index, int64_t out, const T* from) {
                const Unit unit = unit_of(index);
                if (out < unit.out_count) store_filter(unit, out, from, grad_weight);
            });
    }

  private:
    static constexpr int64_t kChannels = 64, kRunVoxels = 32, kListChannels = 32;

    struct Unit {
        int64_t in_channel, in_count, out_channel, out_count;  // counted over all groups
    };

    Unit unit_of(int64_t index) const {
        const int64_t in = index % in_chunks_ * in_chunk_, out = index / in_chunks_ % out_chunks_ * out_chunk_;
        const int64_t group = index / (in_chunks_ * out_chunks_);
        return {group * gather_.source_channels + in, smaller(in_chunk_, gather_.source_channels - in),
                group * gather_.target_channels + out, smaller(out_chunk_, gather_.target_channels - out)};
    }

    // From one row of the packed window to the next along an axis, in elements.
    int64_t window_stride(int axis) const {
        int64_t stride = in_chunk_;
        for (int inner = axis + 1; inner < 3; ++inner) stride *= tiling_.axis[inner].rows;
        return stride;
    }

    void list_segments() {
        shape_ = SegmentShape::of<T>(conv_, in_chunk_, tiling_.axis[2].tap_step == 1);
        segments_ = shape_.rows * shape_.pieces;
        tile_segments_ = even_part(segments_, sparse_segments(shape_.vectors));
        segment_offsets_ = scratch<int32_t>(Scratch::tables, segments_);
        const int64_t widths = shape_.joined ? 1 : conv_.kernel_size[2];
        for (int64_t s = 0; s < segments_; ++s) {
            const int64_t row = s / shape_.pieces;
            const int64_t tap[3] = {row / widths / conv_.kernel_size[1], row / widths % conv_.kernel_size[1],
                                    row % widths};
            int64_t offset = s % shape_.pieces * shape_.vectors * lanes;
            for (int a = 0; a < 3; ++a) offset += tap[a] * tiling_.axis[a].tap_step * window_stride(a);
            segment_offsets_[s] = static_cast<int32_t>(offset);
        }
    }

    // Adds the share of the tiles [first, last) of all samples.
    void sum_tiles(const Unit& unit, int64_t first, int64_t last, T* sums) const {
        const int64_t window_values = tiling_.packed_voxels() * in_chunk_;
        const int64_t beyond = shape_.pieces * shape_.vectors * lanes;  // a segment reads up to its last lane
        T* window = scratch<T>(Scratch::tile_input, window_values + beyond);
        fill_zero(window + window_values, beyond);
        for (int64_t t = first; t < last; ++t) {
            const PooledTile tile(gather_, tiling_, t);
            const SourceBlock block = {tile.sample,
                                       unit.in_channel,
                                       unit.in_count,
                                       in_chunk_,
                                       {tile.origin[0], tile.origin[1], tile.origin[2]}};
            pack_source(gather_, tiling_.axis, false, block, x_, window);
            for (int64_t d = 0; d < tile.count[0]; ++d) {
                for (int64_t h = 0; h < tile.count[1]; h += row_run_) {
                    sum_run(unit, tile, d, h, smaller(row_run_, tile.count[1] - h), window, sums);
                }
            }
        }
    }

    // The pooled rows h .. h + rows - 1 of slice d of a tile.
    void sum_run(const Unit& unit, const PooledTile& tile, int64_t d, int64_t h, int64_t rows, const T* window,
                 T* sums) const {
        const int64_t width = tile.count[2];
        const int64_t voxels = rows * width, voxel = pooled_.axis[2];
        SparseEntry<T>* lists = scratch<SparseEntry<T>>(Scratch::tile_lists, kListChannels * voxels);
        const int64_t first = tile.sample * pooled_.sample + (tile.cell[0] + d) * pooled_.axis[0] +
                              (tile.cell[1] + h) * pooled_.axis[1] + tile.cell[2] * pooled_.axis[2];
        const int64_t tile_values = shape_.vectors * lanes;
        for (int64_t block = 0; block < unit.out_count; block += kListChannels) {
            const int64_t channels = smaller(kListChannels, unit.out_count - block);
            int64_t lengths[kListChannels];
            for (int64_t c = 0; c < channels; ++c) {
                SparseEntry<T>* list = lists + c * voxels;
                int64_t length = 0;
                for (int64_t row = 0; row < rows; ++row) {
                    const int64_t at = first + row * pooled_.axis[1] + (unit.out_channel + block + c) * pooled_.channel;
                    int64_t place = d * cell_step_[0] + (h + row) * cell_step_[1];
                    const T* gradients = grad_ + at;
                    const uint8_t* codes = code_ + at;
                    for (int64_t w = 0; w < width; ++w, place += cell_step_[2]) {
                        const uint8_t code = codes[w * voxel];
                        const T gradient = passed(gradients[w * voxel], code);
                        list[length] = {gradient, static_cast<int32_t>(place) + code_offsets_[code]};
                        length += nonzero(gradient);
                    }
                }
                lengths[c] = length;
            }
            for (int64_t s = 0; s < segments_; s += tile_segments_) {
                const int64_t now = smaller(tile_segments_, segments_ - s);
                const SparseKernel<T> kernel = sparse_kernel<T>(now, shape_.vectors);
                for (int64_t c = 0; c < channels; ++c) {
                    const SparseList<T> list = {lists + c * voxels, lengths[c]};
                    kernel(list, window, segment_offsets_ + s, sums + ((block + c) * segments_ + s) * tile_values,
                           tile_values, lanes);
                }
            }
        }
    }

    void store_filter(const Unit& unit, int64_t out, const T* sums, T* grad_weight) const {
        const int64_t* kernel = conv_.kernel_size;
        const int64_t in_channels = gather_.source_channels, taps = kernel[0] * kernel[1] * kernel[2];
        const int64_t width = shape_.joined ? kernel[2] : 1, run = shape_.pieces * shape_.vectors * lanes;
        const int64_t in = unit.in_channel % in_channels;
        T* filter = grad_weight + (unit.out_channel + out) * taps * in_channels;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const T* from = sums + tap / width * run + tap % width * in_chunk_;
            for (int64_t c = 0; c < unit.in_count; ++c) {
                const bool last = conv_.layout == Layout::ndhwc;
                filter[last ? tap * in_channels + in + c : (in + c) * taps + tap] = from[c];
            }
        }
    }

    const PooledProblem& problem_;
    const ConvProblem& conv_;
    const T* grad_;
    const uint8_t* code_;
    const T* x_;
    const VolumeStrides pooled_;
    const Gather gather_;
    const int64_t in_chunk_, out_chunk_, in_chunks_, out_chunks_, units_;
    Tiling tiling_;
    SegmentShape shape_;
    int64_t segments_, tile_segments_;
    int32_t* segment_offsets_;
    int64_t cell_step_[3];  // from one pooled voxel to the next in the packed window
    int32_t code_offsets_[256];
    int64_t row_run_;  // pooled rows of one run
};

template <typename T>
void sparse_grad_weight(const PooledProblem& problem, const T* grad_pooled, const uint8_t* code, const T* x,
                        T* grad_weight, T* grad_bias) {
    if (SelectGradWeight<T>::suits(problem)) {
        SelectGradWeight<T>(problem, grad_pooled, code, x).run(grad_weight);
    } else {
        SparseGradWeight<T>(problem, grad_pooled, code, x).run(grad_weight);
    }
    if (grad_bias != nullptr) sum_chosen(problem, grad_pooled, code, grad_bias);
}

}  // namespace
}  // namespace pvc
