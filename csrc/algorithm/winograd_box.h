// Winograd convolution of one box of tiles, fused: nothing but the box's sums leaves the cache.
//
//     source:   planes transformed (winograd_operand.h)
//     then, for each block of target channels and each point of a plane:
//     product:  tiles x weights, transformed back along the outer axis   [point
//     of a plane][outer output][tile][column] and at last, for each row of
//     tiles: target:   transformed back in the plane [voxel][target channel]
//
// A transform mixes the voxels of a tile. An infinity or NaN would spread over the tile, and sums of large values may
// overflow that the convolution itself does not contain; so a tile with a result that is not finite is computed again,
// directly. Every source value takes part in each output that depends on it with a non-zero factor, so that none which
// must be infinite or NaN can come out finite.
#pragma once

#include "winograd_operand.h"
#include "winograd_weight.h"

namespace pvc {
namespace {

// The sums of one row of tiles for one block of channels: per axis `count` voxels of the target, `lattice` apart, from
// `first` on, `width` channels each, of which `channels` exist. Voxels beyond the target are computed too.
template <typename T>
struct RowSums {
    const T* sums;
    const uint8_t* codes;  // of largest sums, or null
    int64_t stride[3];
    int64_t first[3], count[3];
    int64_t channel, channels, width;
};

template <typename T>
class WinogradBox {
  public:
    const TileBox<T> box;

    WinogradBox(const Gather& gather, const WinogradWeights<T>& weights, int64_t task)
        : box(weights.blocking, task),
          gather_(gather),
          weights_(weights),
          b_(weights.blocking),
          scheme_(*b_.scheme),
          source_(gather, scheme_, scheme_.source_window(), scheme_.kernels.source, box, Scratch::tile_accumulators) {
        o_ = scheme_.axis[0], p_ = scheme_.axis[1], q_ = scheme_.axis[2];
        product_pitch_ = b_.product_pitch(box.tiles);
        product_ = scratch<T>(Scratch::tile_output, scheme_.plane_points() * product_pitch_);
        sums_ = scratch<T>(Scratch::tile_rows, scheme_.outputs[0] * scheme_.outputs[1] * scheme_.outputs[2] *
                                                   box.tiles[q_] * b_.widest_block());
    }

    // Calls store(RowSums) for each block of target channels and each row of tiles.
    template <typename Store>
    void run(const T* source, const Store& store) {
        compute(source, [&](RowSums<T>& row, int64_t tile) {
            transform_row(source, row, tile);
            store(row);
        });
    }

    // Calls store(RowSums) with the largest value of each 2x2x2 window in place of the sums, none less than `least`,
    // and its code if `codes`, `nothing` where none is above `least`; counts are still those of voxels.
    template <typename Store>
    void run_largest(const T* source, T least, bool codes, int32_t nothing, const Store& store) {
        const int64_t values = scheme_.outputs[p_] / 2 * scheme_.outputs[q_] / 2 * box.tiles[q_] * b_.widest_block();
        largest_ = scratch<T>(Scratch::tile_pooled, values);
        codes_ = codes ? scratch<uint8_t>(Scratch::tile_codes, values) : nullptr;
        compute(source, [&](RowSums<T>& row, int64_t tile) {
            find_largest(source, row, tile, least, nothing);
            store(row);
        });
    }

  private:
    using V = Vector<T>;

    // Calls each(row, first tile of it).
    template <typename Each>
    void compute(const T* source, const Each& each) {
        source_.transform_planes(source);
        for (int64_t block = 0; block < b_.blocks; ++block) {
            for (int64_t point = 0; point < scheme_.plane_points(); ++point) {
                multiply(block, point, source_.transform_outer(point));
            }
            for (int64_t o = 0; o < box.tiles[o_]; ++o) {
                for (int64_t p = 0; p < box.tiles[p_]; ++p) {
                    RowSums<T> row = row_of_tiles(block, o, p);
                    each(row, (o * box.tiles[p_] + p) * box.tiles[q_]);
                }
            }
        }
    }

    void multiply(int64_t block, int64_t point, const T* rows) {
        PanelArguments<T> a = {};
        a.source = rows;
        a.chunk_pitch = source_.row_pitch();
        a.depth = b_.sources;
        a.row_pitch = b_.block_vectors(block) * b_.lanes;
        a.output_pitch = box.all_tiles * a.row_pitch;
        const int64_t outer_weights = scheme_.shape[o_].weights;
        const int64_t first = b_.block_first(block), end = first + b_.block_vectors(block);
        for (int64_t vector = first; vector < end; vector += b_.panel_vectors) {
            a.weight = weights_.transformed + b_.panel_weights(vector) +
                       scheme_.plane_weight(point) * outer_weights * b_.sources * b_.panel_columns(vector);
            a.paired = b_.panel_paired(vector);
            a.target = product_ + point * product_pitch_ + (vector - first) * b_.lanes;
            scheme_.kernels.panel(b_.panel_size(vector), b_.panel_half(vector), box.all_tiles, a);
        }
    }

    RowSums<T> row_of_tiles(int64_t block, int64_t o, int64_t p) const {
        const int64_t width = b_.block_vectors(block) * b_.lanes;
        RowSums<T> row = {};
        row.sums = sums_;
        row.channel = b_.block_first(block) * b_.lanes;
        row.width = width;
        row.channels = smaller(width, b_.targets - row.channel);
        row.stride[q_] = width;
        row.stride[p_] = box.tiles[q_] * scheme_.outputs[q_] * width;
        row.stride[o_] = scheme_.outputs[p_] * row.stride[p_];
        row.first[o_] = box.first[o_] + o * box.step[o_];
        row.first[p_] = box.first[p_] + p * box.step[p_];
        row.first[q_] = box.first[q_];
        for (int a = 0; a < 3; ++a) {
            const int64_t computed = scheme_.outputs[a] * (a == q_ ? box.tiles[q_] : 1);
            const int64_t existing = ceil_divide(b_.voxels[a] - row.first[a], b_.lattice[a]);
            row.count[a] = larger(smaller(computed, existing), 0);
        }
        return row;
    }

    // One tile of the box, all channels of the row's block. Returns whether an output is not finite.
    template <typename Arguments>
    bool transform_tile(bool (*const kernel[2])(const Arguments&), Arguments& a, const RowSums<T>& row, int64_t tile,
                        int64_t to) const {
        bool spoilt = false;
        for (int64_t c = 0; c < row.width; c += b_.lanes) {
            a.from = product_ + tile * row.width + c;
            a.initial = weights_.initial + row.channel + c;
            place(a, to + c);
            spoilt |= kernel[b_.half((row.channel + c) / b_.lanes)](a);
        }
        return spoilt;
    }

    void place(TileTarget<T>& a, int64_t at) const { a.to = sums_ + at; }
    void place(TileLargest<T>& a, int64_t at) const {
        a.to = largest_ + at;
        a.codes = codes_ == nullptr ? nullptr : codes_ + at;
    }

    // The row of tiles from tile `first` of the box on.
    void transform_row(const T* source, RowSums<T>& row, int64_t first) {
        TileTarget<T> a = {};
        a.point = product_pitch_;
        a.output = box.all_tiles * row.width;
        a.outer = row.stride[o_];
        a.row = row.stride[p_];
        a.column = row.stride[q_];
        const T* direct_weights = nullptr;
        for (int64_t q = 0; q < box.tiles[q_]; ++q) {
            T* to = sums_ + q * scheme_.outputs[q_] * row.width;
            if (!transform_tile(scheme_.kernels.target, a, row, first + q, to - sums_)) continue;
            if (direct_weights == nullptr) direct_weights = pack_direct(row);
            compute_direct(source, row, q, direct_weights, to);
        }
    }

    void find_largest(const T* source, RowSums<T>& row, int64_t first, T least, int32_t nothing) {
        TileLargest<T> a = {};
        a.nothing = nothing;
        a.point = product_pitch_;
        a.output = box.all_tiles * row.width;
        a.least = least;
        // Windows may reach beyond the target.
        const auto exist = [&](int axis, int64_t voxel) { return gather_.axis[axis].target_size - voxel; };
        a.exist[0] = smaller(exist(o_, row.first[o_]), row.count[o_]);
        a.exist[1] = smaller(exist(p_, row.first[p_]), row.count[p_]);
        a.column = row.width;
        a.row = scheme_.outputs[q_] / 2 * box.tiles[q_] * row.width;
        const T* direct_weights = nullptr;
        for (int64_t q = 0; q < box.tiles[q_]; ++q) {
            const int64_t place = q * scheme_.outputs[q_] / 2 * row.width;
            a.exist[2] = smaller(exist(q_, row.first[q_] + q * scheme_.outputs[q_]), scheme_.outputs[q_]);
            if (!transform_tile(scheme_.kernels.largest, a, row, first + q, place)) continue;
            if (direct_weights == nullptr) direct_weights = pack_direct(row);
            compute_direct(source, row, q, direct_weights, sums_);
            for (int64_t h = 0; h < a.exist[1]; h += 2) {
                for (int64_t w = 0; w < a.exist[2]; w += 2) {
                    largest_of_sums(row, a, h, w, place + h / 2 * a.row + w / 2 * a.column);
                }
            }
        }
        row.sums = largest_;
        row.codes = codes_;
        row.stride[o_] = 0;
        row.stride[p_] = a.row;
        row.stride[q_] = a.column;
    }

    // Of the window that begins at (h, w) of the tile in sums_. NaN is larger than any number.
    void largest_of_sums(const RowSums<T>& row, const TileLargest<T>& a, int64_t h, int64_t w, int64_t to) const {
        for (int64_t c = 0; c < row.width; ++c) {
            T best = a.least;
            int64_t code = a.nothing;
            for (int64_t voxel = 0; voxel < 8; ++voxel) {
                const int64_t at[3] = {voxel / 4, h + voxel / 2 % 2, w + voxel % 2};
                if (at[0] >= a.exist[0] || at[1] >= a.exist[1] || at[2] >= a.exist[2]) continue;
                const T value = sums_[at[0] * row.stride[o_] + at[1] * row.stride[p_] + at[2] * row.stride[q_] + c];
                if (!(value > best || value != value)) continue;
                best = value;
                code = voxel;
            }
            largest_[to + c] = best;
            if (codes_ != nullptr) codes_[to + c] = static_cast<uint8_t>(code);
        }
    }

    // The block's own weights, [tap][source channel][column].
    const T* pack_direct(const RowSums<T>& row) const {
        const GatherAxis* axis = gather_.axis;
        T* packed =
            scratch<T>(Scratch::tile_lists, axis[0].taps * axis[1].taps * axis[2].taps * b_.sources * row.width);
        pack_taps(gather_, weights_.weight + row.channel * gather_.weight_target_stride, b_.sources, b_.sources,
                  row.channels, row.width, packed);
        return packed;
    }

    // The outputs of tile `q` of a row by the definition of the convolution.
    void compute_direct(const T* source, const RowSums<T>& row, int64_t q, const T* weights, T* to) const {
        const int64_t one[3] = {1, 1, 1};
        int64_t stride[3], tile[3];
        for (int a = 0; a < 3; ++a) tile[a] = a == q_ ? q : (row.first[a] - box.first[a]) / box.step[a];
        const T* input = source_.pack(source, tile, one, -1, stride);
        const int* outputs = scheme_.outputs;
        for (int voxel = 0; voxel < outputs[0] * outputs[1] * outputs[2]; ++voxel) {
            const int at[3] = {voxel / outputs[2] / outputs[1], voxel / outputs[2] % outputs[1], voxel % outputs[2]};
            OutputTaps taps[3];
            T* sums = to;
            for (int a = 0; a < 3; ++a) {
                taps[a] = scheme_.shape[a].output_taps(at[a]);
                sums += at[a] * row.stride[a];
            }
            for (int64_t c = 0; c < row.width; c += b_.lanes) {
                const typename V::type initial = V::load(weights_.initial + row.channel + c);
                V::store(sums + c, sum_direct(input, stride, taps, weights + c, row.width, initial));
            }
        }
    }

    typename V::type sum_direct(const T* input, const int64_t stride[3], const OutputTaps taps[3], const T* weights,
                                int64_t width, typename V::type sum) const {
        const GatherAxis* axis = gather_.axis;
        for (int i = 0; i < taps[0].count * taps[1].count * taps[2].count; ++i) {
            const int at[3] = {i / taps[2].count / taps[1].count, i / taps[2].count % taps[1].count, i % taps[2].count};
            const T* values = input;
            int64_t tap = 0;
            for (int a = 0; a < 3; ++a) {
                values += (taps[a].voxel + at[a]) * stride[a];
                tap = tap * axis[a].taps + taps[a].tap + at[a] * taps[a].tap_step;
            }
            const T* column = weights + tap * b_.sources * width;
            for (int64_t s = 0; s < b_.sources; ++s) sum += values[s] * V::load(column + s * width);
        }
        return sum;
    }

    const Gather& gather_;
    const WinogradWeights<T>& weights_;
    const WinogradBlocking<T>& b_;
    const WinogradScheme<T>& scheme_;
    int o_, p_, q_;          // axes: the outer one, those of a plane
    int64_t product_pitch_;  // between points of a plane
    WinogradOperand<T> source_;
    T* product_;
    T* sums_;
    T* largest_ = nullptr;
    uint8_t* codes_ = nullptr;
};

}  // namespace
}  // namespace pvc
