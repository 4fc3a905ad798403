// Gradient of the weight behind a max-pool, for few input channels (a network's first layer). The lanes are output
// channels: all of them need, for a tap, one voxel each of the same small window of x.
//
// Of the packed window of x, the rows that one pooling window spans are interleaved, voxel by voxel: a block is the
// window_w * rows values from one voxel on, and the block of the next tap along the width begins `rows` values later. A
// block fits one vector, out of which each lane permutes its chosen voxel (microkernel/select_sum.h). Gradients that
// are zero are multiplied like any other.
#pragma once

#include "../microkernel/select_sum.h"
#include "sparse_gradient.h"

namespace pvc {
namespace {

template <typename T>
class SelectGradWeight {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes;

    // Vectors are long enough for a block, permutations of 8 lanes are one instruction, and lists would be slower.
    static bool suits(const PooledProblem& problem) {
        const int64_t* window = problem.pool_window;
        const int64_t voxels = (window[2] - 1) * problem.conv.stride[2] + 1;
        const int64_t in = problem.conv.in_channels / problem.conv.groups;
        const int64_t out = problem.conv.out_channels / problem.conv.groups;
        if (lanes < 8 || in > 4 || 2 * out < lanes || voxels * window[0] * window[1] > lanes) return false;
        const Tiling tiling = tile(gather_windows(problem));
        return tiling.axis[0].dense && tiling.axis[1].dense && tiling.axis[2].dense;
    }

    SelectGradWeight(const PooledProblem& problem, const T* grad, const uint8_t* code, const T* x)
        : problem_(problem),
          conv_(problem.conv),
          grad_(grad),
          code_(code),
          x_(x),
          pooled_(volume_strides(conv_.layout, conv_.out_channels, problem.pooled_size)),
          gather_(gather_windows(problem)),
          tiling_(tile(gather_)),
          in_channels_(gather_.source_channels),
          out_channels_(gather_.target_channels),
          taps_(conv_.kernel_size[0] * conv_.kernel_size[1] * conv_.kernel_size[2]),
          columns_(in_channels_ * taps_),
          vectors_(ceil_divide(out_channels_, lanes)),
          rows_(problem.pool_window[0] * problem.pool_window[1]),
          shift_(conv_.dilation[2] * rows_),
          shifts_(choose_shifts()),
          block_offsets_(scratch<int32_t>(Scratch::tables, columns_ / shifts_)) {
        for (int a = 0; a < 2; ++a) {
            block_rows_[a] = tiling_.axis[a].rows - (problem.pool_window[a] - 1) * conv_.stride[a];
        }
        block_stride_[2] = rows_;
        block_stride_[1] = tiling_.axis[2].rows * rows_;
        block_stride_[0] = block_rows_[1] * block_stride_[1];
        const int64_t* kernel = conv_.kernel_size;
        for (int64_t block = 0; block < columns_ / shifts_; ++block) {
            const int64_t column = block * shifts_;
            const int64_t tap = column % taps_;
            const int64_t position[3] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]};
            int64_t offset = column / taps_ * block_rows_[0] * block_stride_[0];
            for (int a = 0; a < 3; ++a) offset += position[a] * conv_.dilation[a] * block_stride_[a];
            block_offsets_[block] = static_cast<int32_t>(offset);
        }
        const int64_t* window = problem.pool_window;
        for (int64_t code = 0; code < lanes; ++code) {
            lane_of_code_[code] = static_cast<Integer>(code % window[2] * conv_.stride[2] * rows_ + code / window[2]);
        }
    }

    // `grad_bias`, which may be null, is summed on the way: as if each filter had one more tap, on a source of ones.
    void run(T* grad_weight, T* grad_bias) const {
        const int64_t tiles = gather_.batch * tiling_.count();
        const SplitSums sums(gather_.groups, vectors_, (columns_ + 1) * lanes, tiles, sizeof(T));
        sums.run<T>(
            tiles, [&](int64_t group, int64_t first, int64_t last, T* to) { sum_tiles(group, first, last, to); },
            [&](int64_t group, int64_t vector, const T* from) {
                store(group, vector * lanes, from, grad_weight, grad_bias);
            });
    }

  private:
    using Integer = typename VectorType<T>::integer;

    // Of the taps along the width, how many a vector holds the window of.
    int64_t choose_shifts() const {
        const int64_t span = ((problem_.pool_window[2] - 1) * conv_.stride[2] + 1) * rows_;
        const bool fit = conv_.kernel_size[2] == kSelectShifts && (kSelectShifts - 1) * shift_ + span <= lanes;
        return fit ? kSelectShifts : 1;
    }

    static Tiling tile(const Gather& gather) {
        const int64_t values = kL2Bytes / 2 / static_cast<int64_t>(sizeof(T)) / gather.source_channels;
        const int64_t copies = gather.window[0].extent * gather.window[1].extent + 1;
        return choose_tiling(gather, {values / copies, INT32_MAX, gather.batch * gather.groups, 1, true});
    }

    // One channel of x, contiguous along the width, and the position in it, maybe outside, where a tile begins.
    struct Box {
        const T* data;
        int64_t stride[2], first[3], size[3];
    };

    void sum_tiles(int64_t group, int64_t first, int64_t last, T* sums) const {
        const int64_t width = tiling_.axis[2].rows, voxels = tiling_.packed_voxels();
        const int64_t block_values = block_rows_[0] * block_stride_[0];
        const bool planar = conv_.layout == Layout::ncdhw || conv_.in_channels == 1;
        T* window = planar ? nullptr : scratch<T>(Scratch::tile_input, voxels * in_channels_);
        T* blocks = scratch<T>(Scratch::tile_output, block_values * in_channels_ + lanes);
        T* zeros = scratch<T>(Scratch::tile_lists, width);
        fill_zero(zeros, width);
        for (int64_t t = first; t < last; ++t) {
            const PooledTile tile(gather_, tiling_, t);
            const int64_t* size = conv_.input_size;
            Box box = {};
            if (planar) {
                box = {x_ + (tile.sample * conv_.in_channels + group * in_channels_) * size[0] * size[1] * size[2],
                       {size[1] * size[2], size[2]},
                       {tile.origin[0], tile.origin[1], tile.origin[2]},
                       {size[0], size[1], size[2]}};
            } else {
                const PackedAxis* axis = tiling_.axis;
                const SourceBlock block = {tile.sample,
                                           group * in_channels_,
                                           in_channels_,
                                           in_channels_,
                                           {tile.origin[0], tile.origin[1], tile.origin[2]}};
                pack_source(gather_, axis, true, block, x_, window);
                box = {window, {axis[1].rows * width, width}, {}, {axis[0].rows, axis[1].rows, width}};
            }
            for (int64_t c = 0; c < in_channels_; ++c) {
                interleave(box, zeros, blocks + c * block_values);
                box.data += box.stride[0] * box.size[0];
            }
            for (int64_t d = 0; d < tile.count[0]; ++d) sum_slice(group, tile, d, blocks, sums);
        }
    }

    // [block row 0][block row 1][voxel][row of the pooling window]
    void interleave(const Box& box, const T* zeros, T* blocks) const {
        const int64_t width = tiling_.axis[2].rows;
        const int64_t begin = smaller(larger(-box.first[2], 0), width);
        const int64_t end = larger(smaller(box.size[2] - box.first[2], width), begin);
        for (int64_t d = 0; d < block_rows_[0]; ++d) {
            for (int64_t h = 0; h < block_rows_[1]; ++h, blocks += width * rows_) {
                const T* from[lanes] = {};
                for (int64_t r = 0; r < rows_; ++r) {
                    const int64_t depth = box.first[0] + d + r / problem_.pool_window[1] * conv_.stride[0];
                    const int64_t height = box.first[1] + h + r % problem_.pool_window[1] * conv_.stride[1];
                    const bool inside = depth >= 0 && depth < box.size[0] && height >= 0 && height < box.size[1];
                    from[r] = inside ? box.data + depth * box.stride[0] + height * box.stride[1] + box.first[2] + begin
                                     : zeros;
                }
                fill_zero(blocks, begin * rows_);
                interleave_rows(from, end - begin, blocks + begin * rows_);
                fill_zero(blocks + end * rows_, (width - end) * rows_);
            }
        }
    }

    void interleave_rows(const T* const* from, int64_t width, T* to) const {
        int64_t w = 0;
        if constexpr (Transpose<T>::part == 4) {
            if (rows_ == 4 && width >= lanes) {
                for (; w < width; w += lanes) {
                    w = smaller(w, width - lanes);
                    typename Vector<T>::type rows[4];
                    for (int r = 0; r < 4; ++r) rows[r] = Vector<T>::load(from[r] + w);
                    Transpose<T>::interleave_four(rows);
                    for (int r = 0; r < 4; ++r) Vector<T>::store(to + w * 4 + r * lanes, rows[r]);
                }
            }
        }
        for (; w < width; ++w) {
            for (int64_t r = 0; r < rows_; ++r) to[w * rows_ + r] = from[r][w];
        }
    }

    // Slice d of a tile of pooled voxels.
    void sum_slice(int64_t group, const PooledTile& tile, int64_t d, const T* blocks, T* sums) const {
        const int64_t width = tile.count[2];
        int64_t step[3];
        for (int a = 0; a < 3; ++a) step[a] = problem_.pool_stride[a] * conv_.stride[a] * block_stride_[a];
        SelectArguments<T> a = {};
        a.step = step[2];
        a.count = width;
        a.lane_of_code = lane_of_code_;
        a.shift = shift_;
        a.values = grad_ + tile.sample * pooled_.sample + group * out_channels_ * pooled_.channel +
                   (tile.cell[0] + d) * pooled_.axis[0] + tile.cell[1] * pooled_.axis[1] +
                   tile.cell[2] * pooled_.axis[2];
        a.codes = code_ + (a.values - grad_);
        a.pitch = pooled_.axis[2];
        int64_t row = pooled_.axis[1];
        if (pooled_.channel != 1 || out_channels_ != vectors_ * lanes) {
            pack_gradients(tile, a);
            row = width * a.pitch;
        }
        const int64_t all = columns_ / shifts_, now = even_part(all, select_blocks(shifts_));
        for (int64_t h = 0; h < tile.count[1]; ++h, a.values += row, a.codes += row) {
            a.blocks = blocks + d * step[0] + h * step[1];
            for (int64_t vector = 0; vector < vectors_; ++vector) {
                SelectArguments<T> part = a;
                part.values += vector * lanes;
                part.codes += vector * lanes;
                T* to = sums + vector * (columns_ + 1) * lanes;
                part.total = to + columns_ * lanes;
                for (int64_t block = 0; block < all; block += now) {
                    select_kernel<T>(smaller(now, all - block), shifts_)(part, block_offsets_ + block,
                                                                         to + block * shifts_ * lanes);
                    part.total = nullptr;
                }
            }
        }
    }

    // Gradients and codes of one slice as [row][voxel][whole vectors of channels].
    void pack_gradients(const PooledTile& tile, SelectArguments<T>& a) const {
        const int64_t pitch = vectors_ * lanes, voxels = tile.count[1] * tile.count[2];
        T* values = scratch<T>(Scratch::tile_accumulators, voxels * pitch);
        uint8_t* codes = scratch<uint8_t>(Scratch::tile_rows, voxels * pitch);
        if (pitch > out_channels_) {
            fill_zero(values, voxels * pitch);
            std::memset(codes, 0, static_cast<size_t>(voxels * pitch));
        }
        const bool whole = tile.count[2] * pooled_.axis[2] == pooled_.axis[1];  // rows follow one another
        const int64_t rows = whole ? 1 : tile.count[1], count = voxels / rows;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t from = row * pooled_.axis[1], to = row * count * pitch;
            copy_matrix(a.values + from, {pooled_.axis[2], pooled_.channel}, values + to, {pitch, 1}, count,
                        out_channels_);
            if (pooled_.channel == 1) {
                for (int64_t v = 0; v < count; ++v) {
                    std::memcpy(codes + to + v * pitch, a.codes + from + v * pooled_.axis[2],
                                static_cast<size_t>(out_channels_));
                }
            } else {
                transpose(a.codes + from, pooled_.channel, codes + to, pitch, out_channels_, count);
            }
        }
        a.values = values;
        a.codes = codes;
        a.pitch = pitch;
    }

    void store(int64_t group, int64_t first, const T* sums, T* grad_weight, T* grad_bias) const {
        const bool last = conv_.layout == Layout::ndhwc;
        for (int64_t o = 0; o < smaller(lanes, out_channels_ - first); ++o) {
            const int64_t out = group * out_channels_ + first + o;
            if (grad_bias != nullptr) grad_bias[out] = sums[columns_ * lanes + o];
            T* filter = grad_weight + out * columns_;
            for (int64_t column = 0; column < columns_; ++column) {
                const int64_t channel = column / taps_, tap = column % taps_;
                filter[last ? tap * in_channels_ + channel : column] = sums[column * lanes + o];
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
    const Tiling tiling_;
    const int64_t in_channels_, out_channels_;  // of a group
    const int64_t taps_, columns_, vectors_;
    const int64_t rows_;            // of x that one pooling window spans, interleaved
    const int64_t shift_, shifts_;  // between taps along the width; how many of them share a block
    int32_t* block_offsets_;
    int64_t block_rows_[2], block_stride_[3];
    Integer lane_of_code_[lanes];
};

}  // namespace
}  // namespace pvc
