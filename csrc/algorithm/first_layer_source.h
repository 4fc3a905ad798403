// The source of a slab of tiles for first_layer.h: packed planar with its padding, and transformed row by row.
//
// The rows under the tiles of one depth are transformed along depth and width once and kept, each for the two tiles
// along the height that it lies under; the transform along the height follows for one strip at a time, a vector of
// tiles along the width, whose points stay in L1 for all output channels.
#pragma once

#include "../arena.h"
#include "../microkernel/first_layer_tile.h"
#include "pack_source.h"
#include "winograd_axis.h"

namespace pvc {
namespace {

// Tiles of 2 x 2 x 2 outputs of one sample from tile `first` on; along the width all of them.
struct FirstLayerSlab {
    int64_t sample, first[3], count[3];
};

inline Gather first_layer_gather(const ConvProblem& problem) {
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    return gather;
}

template <typename T>
class FirstLayerSource {
  public:
    using V = Vector<T>;
    using vector = typename V::type;
    static constexpr int64_t lanes = V::lanes;

    FirstLayerSource(const Gather& gather, const T* x, const FirstLayerSlab& slab)
        : channels_(gather.source_channels), strips_(ceil_divide(slab.count[2], lanes)) {
        PackedAxis packed[3];
        SourceBlock block = {};
        block.sample = slab.sample;
        block.channels = block.width = channels_;
        for (int a = 0; a < 3; ++a) {
            rows_[a] = 2 * slab.count[a] + 2;
            packed[a] = {2 * slab.count[a], rows_[a], 1, 1, true};
            block.origin[a] = gather.axis[a].source_start + 2 * slab.first[a];
        }
        plane_ = rows_[1] * rows_[2];
        packed_ = scratch<T>(Scratch::tile_input, channels_ * rows_[0] * plane_ + 2 * lanes);
        transformed_ = scratch<T>(Scratch::tile_lists, 4 * strips_ * channels_ * 16 * lanes);
        points_ = scratch<T>(Scratch::tile_accumulators, channels_ * kFirstLayerPoints * lanes);
        pack_source(gather, packed, true, block, x, packed_);
    }

    // Whether all values are at most `limit` and none is infinite or NaN.
    bool within(T limit) const {
        using integers = typename VectorType<T>::integers;
        const vector most = vector{} + limit;
        integers beyond = {};
        const int64_t count = channels_ * rows_[0] * plane_;
        for (int64_t i = 0; i < count; i += lanes) {
            const vector value = V::load(packed_ + smaller(i, larger(count - lanes, 0)));
            beyond |= ~((value <= most) & (value >= -most));
        }
        for (int64_t lane = 0; lane < smaller(lanes, count); ++lane) {
            if (beyond[lane] != 0) return false;
        }
        return true;
    }

    // Transforms row `row` under the tiles of depth d along depth and width.
    void transform_row(int64_t d, int64_t row) {
        for (int64_t strip = 0; strip < strips_; ++strip) {
            for (int64_t c = 0; c < channels_; ++c) {
                const T* from = packed_ + (c * rows_[0] + 2 * d) * plane_ + row * rows_[2] + 2 * strip * lanes;
                vector v[16];
#pragma GCC unroll 4
                for (int plane = 0; plane < 4; ++plane, from += plane_) {
                    const vector low = V::load(from), high = V::load(from + lanes);
                    const vector next_low = V::load(from + 2), next_high = V::load(from + lanes + 2);
                    v[4 * plane] = pick<EvenVoxels>(low, high);
                    v[4 * plane + 1] = pick<OddVoxels>(low, high);
                    v[4 * plane + 2] = pick<EvenVoxels>(next_low, next_high);
                    v[4 * plane + 3] = pick<OddVoxels>(next_low, next_high);
                    WinogradAxis<2>::source(v + 4 * plane, 1);
                }
#pragma GCC unroll 4
                for (int w = 0; w < 4; ++w) WinogradAxis<2>::source(v + w, 4);
                T* to = transformed(row, strip, c);
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) V::store(to + i * lanes, v[i]);
            }
        }
    }

    // The points [channel][point][tile] of a strip of the tiles whose first row is `row`; transform_row was called for
    // it and the three that follow, and for no later one.
    const T* points(int64_t row, int64_t strip) {
        for (int64_t c = 0; c < channels_; ++c) {
            const T* from[4];
            for (int h = 0; h < 4; ++h) from[h] = transformed(row + h, strip, c);
            T* to = points_ + c * kFirstLayerPoints * lanes;
#pragma GCC unroll 4
            for (int64_t d = 0; d < 4; ++d, to += 16 * lanes) {
#pragma GCC unroll 4
                for (int64_t w = 0; w < 4; ++w) {
                    vector v[4];
                    for (int h = 0; h < 4; ++h) v[h] = V::load(from[h] + (4 * d + w) * lanes);
                    WinogradAxis<2>::source(v, 1);
                    for (int h = 0; h < 4; ++h) V::store(to + (4 * h + w) * lanes, v[h]);
                }
            }
        }
        return points_;
    }

    // The first of the 4 x 4 x 4 values under tile (d, h, w) of the slab.
    const T* values(int64_t d, int64_t h, int64_t w) const {
        return packed_ + 2 * d * plane_ + 2 * h * rows_[2] + 2 * w;
    }
    int64_t row_stride() const { return rows_[2]; }
    int64_t plane_stride() const { return plane_; }
    int64_t channel_stride() const { return rows_[0] * plane_; }

  private:
    struct EvenVoxels {
        static constexpr int lane(int i) { return 2 * i; }
    };
    struct OddVoxels {
        static constexpr int lane(int i) { return 2 * i + 1; }
    };

    template <typename Pick>
    static inline vector pick(vector a, vector b) {
        return Transpose<T>::template pick<Pick>(a, b);
    }

    T* transformed(int64_t row, int64_t strip, int64_t channel) const {
        return transformed_ + ((row % 4 * strips_ + strip) * channels_ + channel) * 16 * lanes;
    }

    int64_t channels_, strips_;
    int64_t rows_[3], plane_;
    T* packed_;       // [channel][depth][height][width]
    T* transformed_;  // [row modulo 4][strip][channel][point along depth and width][tile]
    T* points_;
};

}  // namespace
}  // namespace pvc
