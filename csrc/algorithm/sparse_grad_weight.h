// Gradient of the weight behind a max-pool:
//
//   grad_weight[oc][tap][ic] = sum over pooled voxels p of  grad_pooled[p][oc] * x[chosen(p, oc) * stride - padding +
//                              tap * dilation][ic]
//
// A unit is a chunk of output and of input channels of one group. For each block of pooled voxels every output channel
// gets the list of its non-zero gradients; then, a slice of input channels at a time, the window of x under the block
// is packed with its channels innermost, and each list sums the segments of x that it points at
// (microkernel/sparse_sum.h). A split is a range of blocks with sums of its own; the sums of all splits are added in
// order, so the result does not depend on the number of threads. Few input channels, which would leave lanes of a
// segment idle, have a kernel of their own (select_grad_weight.h).
#pragma once

#include "chosen_sum.h"
#include "select_grad_weight.h"
#include "sparse_blocks.h"

namespace pvc {
namespace {

template <typename T>
class SparseGradWeight {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes;

    SparseGradWeight(const PooledProblem& problem, const T* grad, const uint8_t* code, const T* x)
        : conv_(problem.conv),
          grad_(grad),
          code_(code),
          x_(x),
          pooled_(volume_strides(conv_.layout, conv_.out_channels, problem.pooled_size)),
          gather_(gather_windows(problem)),
          in_chunk_(even_part(gather_.source_channels, kChannels)),
          out_chunk_(even_part(gather_.target_channels, kChannels)),
          in_chunks_(ceil_divide(gather_.source_channels, in_chunk_)),
          out_chunks_(ceil_divide(gather_.target_channels, out_chunk_)),
          units_(gather_.groups * in_chunks_ * out_chunks_),
          slice_(slice_channels(in_chunk_)),
          slices_(ceil_divide(in_chunk_, slice_)),
          blocks_(gather_, in_chunk_, slice_, out_chunk_, conv_.layout == Layout::ncdhw, sizeof(T)),
          shape_(SegmentShape::of<T>(conv_, slice_, blocks_.axis[2].tap_step == 1)),
          segments_(shape_.rows * shape_.pieces),
          tile_segments_(even_part(segments_, sparse_segments(shape_.vectors))),
          segment_offsets_(scratch<int32_t>(Scratch::tables, segments_)),
          codes_(problem.pool_window[0] * problem.pool_window[1] * problem.pool_window[2]) {
        list_segments();
        int64_t step[3];
        for (int a = 0; a < 3; ++a) {
            step[a] = blocks_.axis[a].voxel_step * window_stride(a);
            cell_step_[a] = step[a] * problem.pool_stride[a];
        }
        list_code_offsets(problem, step, code_offsets_);
    }

    void run(T* grad_weight) const {
        const int64_t part = slices_ * segments_ * shape_.vectors * lanes;
        const SplitSums sums(units_, out_chunk_, part, gather_.batch * blocks_.count(), sizeof(T));
        sums.run<T>(
            gather_.batch * blocks_.count(),
            [&](int64_t unit, int64_t first, int64_t last, T* to) { sum_blocks(unit_of(unit), first, last, to); },
            [&](int64_t index, int64_t out, const T* from) {
                const Unit unit = unit_of(index);
                if (out < unit.out_count) store_filter(unit, out, from, grad_weight);
            });
    }

  private:
    static constexpr int64_t kChannels = 64;

    struct Unit {
        int64_t in_channel, in_count, out_channel, out_count;  // counted over all groups
    };

    Unit unit_of(int64_t index) const {
        const int64_t in = index % in_chunks_ * in_chunk_, out = index / in_chunks_ % out_chunks_ * out_chunk_;
        const int64_t group = index / (in_chunks_ * out_chunks_);
        return {group * gather_.source_channels + in, smaller(in_chunk_, gather_.source_channels - in),
                group * gather_.target_channels + out, smaller(out_chunk_, gather_.target_channels - out)};
    }

    // Whole vectors of channels begin at cache lines; where they would leave many lanes idle, taps are joined instead.
    static int64_t slice_channels(int64_t channels) {
        constexpr int64_t step = kHalfSlices ? lanes / 2 : lanes;
        const int64_t idle = ceil_divide(channels, step) * step - channels;
        return channels >= step && 4 * idle <= channels ? lanes : channels;
    }

    // From one row of the packed window to the next along an axis, in elements.
    int64_t window_stride(int axis) const {
        int64_t stride = slice_;
        for (int inner = axis + 1; inner < 3; ++inner) stride *= blocks_.axis[inner].rows;
        return stride;
    }

    void list_segments() {
        const int64_t widths = shape_.joined ? 1 : conv_.kernel_size[2];
        for (int64_t s = 0; s < segments_; ++s) {
            const int64_t row = s / shape_.pieces;
            const int64_t tap[3] = {row / widths / conv_.kernel_size[1], row / widths % conv_.kernel_size[1],
                                    row % widths};
            int64_t offset = s % shape_.pieces * shape_.vectors * lanes;
            for (int a = 0; a < 3; ++a) offset += tap[a] * blocks_.axis[a].tap_step * window_stride(a);
            segment_offsets_[s] = static_cast<int32_t>(offset);
        }
    }

    // Adds the share of the blocks [first, last) of all samples.
    void sum_blocks(const Unit& unit, int64_t first, int64_t last, T* sums) const {
        const int64_t window_values = blocks_.packed_voxels() * slice_;
        const int64_t beyond = shape_.pieces * shape_.vectors * lanes;  // a segment reads up to its last lane
        const int64_t staged_values = blocks_.staged ? blocks_.tiling.packed_voxels() * in_chunk_ : 0;
        T* window = scratch<T>(Scratch::tile_input, window_values + beyond);
        T* staged = scratch<T>(Scratch::tile_output, staged_values);
        fill_zero(window + window_values, beyond);
        int32_t counts[kChannels];
        const int64_t list = blocks_.cells() + lanes;
        const GradientLists<T> lists = {scratch<T>(Scratch::tile_lists, out_chunk_ * list),
                                        scratch<int32_t>(Scratch::tile_rows, out_chunk_ * list), counts, list};
        const Gather from_staged = blocks_.gather_staged(gather_, in_chunk_);
        for (int64_t b = first; b < last; ++b) {
            const PooledTile tile(gather_, blocks_.tiling, b / blocks_.per_tile());
            const PooledBlock block(gather_, blocks_, tile, b % blocks_.per_tile());
            if (b == first || b % blocks_.per_tile() == 0) {
                const SourceBlock source = {tile.sample,
                                            unit.in_channel,
                                            unit.in_count,
                                            in_chunk_,
                                            {tile.origin[0], tile.origin[1], tile.origin[2]}};
                if (blocks_.staged) {
                    pack_source(gather_, blocks_.tiling.axis, false, source, x_, staged);
                } else if (conv_.layout == Layout::ndhwc) {
                    read_source(gather_, blocks_.tiling.axis, source, x_);
                }
            }
            if (block.empty()) continue;
            list_gradients(unit, tile.sample, block, lists);
            for (int64_t slice = 0; slice * slice_ < unit.in_count; ++slice) {
                const int64_t channels = smaller(slice_, unit.in_count - slice * slice_);
                const bool half =
                    kHalfSlices && slice_ == lanes && shape_.vectors <= kHalfSliceVectors && channels <= lanes / 2;
                SourceBlock source = {0, slice * slice_, channels, half ? lanes / 2 : slice_, {}};
                for (int a = 0; a < 3; ++a) source.origin[a] = block.origin[a] + (blocks_.staged ? 0 : tile.origin[a]);
                if (blocks_.staged) {
                    pack_source(from_staged, blocks_.axis, false, source, staged, window);
                } else {
                    source.sample = tile.sample;
                    source.channel += unit.in_channel;
                    pack_source(gather_, blocks_.axis, false, source, x_, window);
                }
                add_lists(unit, lists, half, window, sums + slice * segments_ * shape_.vectors * lanes);
            }
        }
    }

    void list_gradients(const Unit& unit, int64_t sample, const PooledBlock& block,
                        const GradientLists<T>& lists) const {
        const int64_t first = sample * pooled_.sample + unit.out_channel * pooled_.channel +
                              block.cell[0] * pooled_.axis[0] + block.cell[1] * pooled_.axis[1] +
                              block.cell[2] * pooled_.axis[2];
        const bool by_lanes = unit.out_count >= lanes && can_append_lanes<T>(pooled_.channel, codes_);
        const int64_t channels = by_lanes ? lanes : unit.out_count;
        int64_t at[lanes];
        int32_t place[lanes];
        GradientCells<T> cells = {grad_ + first, code_ + first, pooled_.channel, 0, at, place, code_offsets_};
        for (int64_t next = 0; next < unit.out_count; next += channels) {
            const int64_t channel = smaller(next, unit.out_count - channels);  // what is listed already is listed again
            for (int64_t c = channel; c < channel + channels; ++c) lists.counts[c] = 0;
            const auto flush = [&] {
                if (by_lanes)
                    append_lanes(cells, channel, lists);
                else
                    append_gradients(cells, channel, channels, lists);
                cells.count = 0;
            };
            for (int64_t d = 0; d < block.count[0]; ++d) {
                for (int64_t h = 0; h < block.count[1]; ++h) {
                    for (int64_t w = 0; w < block.count[2]; ++w) {
                        at[cells.count] = d * pooled_.axis[0] + h * pooled_.axis[1] + w * pooled_.axis[2];
                        place[cells.count] =
                            static_cast<int32_t>(d * cell_step_[0] + h * cell_step_[1] + w * cell_step_[2]);
                        if (++cells.count == lanes) flush();
                    }
                }
            }
            if (cells.count > 0) flush();
        }
    }

    void add_lists(const Unit& unit, const GradientLists<T>& lists, bool half, const T* window, T* sums) const {
        const int64_t vectors = shape_.vectors, pitch = slices_ * segments_ * vectors * lanes;
        for (int64_t s = 0; s < segments_; s += tile_segments_) {
            const SparseKernel<T> add = sparse_kernel<T>(smaller(tile_segments_, segments_ - s), vectors, half);
            for (int64_t c = 0; c < unit.out_count; ++c) {
                const int64_t begin = c * lists.pitch;
                add({lists.values + begin, lists.offsets + begin, lists.counts[c]}, window, segment_offsets_ + s,
                    sums + c * pitch + s * vectors * lanes);
            }
        }
    }

    void store_filter(const Unit& unit, int64_t out, const T* sums, T* grad_weight) const {
        const int64_t* kernel = conv_.kernel_size;
        const int64_t in_channels = gather_.source_channels, taps = kernel[0] * kernel[1] * kernel[2];
        const int64_t width = shape_.joined ? kernel[2] : 1, run = shape_.pieces * shape_.vectors * lanes;
        const int64_t in = unit.in_channel % in_channels;
        const bool last = conv_.layout == Layout::ndhwc;
        T* filter = grad_weight + (unit.out_channel + out) * taps * in_channels;
        for (int64_t tap = 0; tap < taps; ++tap) {
            for (int64_t c = 0; c < unit.in_count; ++c) {
                const T value =
                    sums[(c / slice_ * shape_.rows + tap / width) * run + tap % width * slice_ + c % slice_];
                filter[last ? tap * in_channels + in + c : (in + c) * taps + tap] = value;
            }
        }
    }

    const ConvProblem& conv_;
    const T* grad_;
    const uint8_t* code_;
    const T* x_;
    const VolumeStrides pooled_;
    const Gather gather_;
    const int64_t in_chunk_, out_chunk_, in_chunks_, out_chunks_, units_;
    const int64_t slice_, slices_;  // input channels packed at once
    const PooledBlocks blocks_;
    const SegmentShape shape_;
    const int64_t segments_, tile_segments_;
    int32_t* segment_offsets_;
    const int64_t codes_;
    int64_t cell_step_[3];  // from one pooled voxel to the next in the packed window
    int32_t code_offsets_[256];
};

template <typename T>
void sparse_grad_weight(const PooledProblem& problem, const T* grad_pooled, const uint8_t* code, const T* x,
                        T* grad_weight, T* grad_bias) {
    if (SelectGradWeight<T>::suits(problem)) {
        SelectGradWeight<T>(problem, grad_pooled, code, x).run(grad_weight, grad_bias);
    } else {
        SparseGradWeight<T>(problem, grad_pooled, code, x).run(grad_weight);
        if (grad_bias != nullptr) sum_chosen(problem, grad_pooled, code, grad_bias);
    }
}

}  // namespace
}  // namespace pvc
