// The products of F(2x2x2, 3x3x3) for the weight gradient of a few input channels: for every point of a tile, the
// transformed source (one value per input channel) times the transformed gradient (one vector of output channels),
// summed over a row of tiles.
//
// The eight gradients of a tile become 64 values by additions alone (`gradient` of algorithm/winograd_axis.h), each
// born in a register where it meets its products, 64 FMAs per input channel and about 60 additions beside them where
// direct convolution takes 216 FMAs. The sums of 64 points do not fit the registers: points of one depth and some of
// the heights pass over the row together, few enough that their sums for all input channels do.
//
// Point (d, h, w) is number (d * 4 + h) * 4 + w.
#pragma once

#include "first_layer_tile.h"

namespace pvc {
namespace {

template <typename T>
struct FirstLayerProducts {
    const T* source;    // [channel][point][lanes], lanes are tiles
    const T* gradient;  // the row's first voxel, one vector of channels
    int64_t pitch[3];   // between gradients along depth, height and width
    int64_t tiles;      // at most `lanes`
    int64_t ahead;      // from a gradient of this row to that of the row that comes next
    T* sums;            // [channel][point][lanes]
};

template <typename T, int Channels, int D, unsigned Heights>
void add_first_layer_points(const FirstLayerProducts<T>& a) {
    using V = Vector<T>;
    using vector = typename V::type;
    constexpr int lanes = V::lanes, kHeights = __builtin_popcount(Heights);
    const auto number = [](int h) { return __builtin_popcount(Heights & ((1u << h) - 1)); };
    const auto combine = [](int point, vector first, vector second) __attribute__((always_inline)) {
        return point == 0 ? first : point == 1 ? first + second : point == 2 ? first - second : second;
    };
    constexpr int kGroups = 4 / kHeights, kPasses = 4 * kGroups;
    constexpr int kGroup = kHeights == 1 ? __builtin_ctz(Heights) : Heights == 6;
    constexpr int kPass = D * kGroups + kGroup;
    vector sum[kHeights][4][Channels];
    const auto for_points = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
            for (int h = 0; h < 4; ++h) {
                if (!(Heights >> h & 1)) continue;
#pragma GCC unroll 4
                for (int c = 0; c < Channels; ++c) {
                    body(h, w, c, (c * kFirstLayerPoints + D * 16 + h * 4 + w) * lanes, sum[number(h)][w][c]);
                }
            }
        }
    };
    for_points([&](int, int, int, int place, vector& to)
                   __attribute__((always_inline)) { to = V::load(a.sums + place); });
    const T* from = a.gradient;
    for (int64_t tile = 0; tile < a.tiles; ++tile, from += 2 * a.pitch[2]) {
        vector y[2][2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 2
            for (int w = 0; w < 2; ++w) {
                const T* first = from + h * a.pitch[1] + w * a.pitch[2];
                const T* second = first + a.pitch[0];
                if constexpr (D == 0) y[h][w] = V::load(first);
                if constexpr (D == 3) y[h][w] = V::load(second);
                if constexpr (D == 1 || D == 2) y[h][w] = combine(D, V::load(first), V::load(second));
            }
        }
        // Every pass over the row fetches its share of the next one: fetched at one time, it would be waited for.
#pragma GCC unroll 8
        for (int voxel = kPass * 8 / kPasses; voxel < (kPass + 1) * 8 / kPasses; ++voxel) {
            const int d = voxel / 4, h = voxel / 2 % 2, w = voxel % 2;
            __builtin_prefetch(from + d * a.pitch[0] + h * a.pitch[1] + w * a.pitch[2] + a.ahead);
        }
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
            const vector low = combine(w, y[0][0], y[0][1]), high = combine(w, y[1][0], y[1][1]);
#pragma GCC unroll 4
            for (int h = 0; h < 4; ++h) {
                if (!(Heights >> h & 1)) continue;
                const vector value = combine(h, low, high);
#pragma GCC unroll 4
                for (int c = 0; c < Channels; ++c) {
                    vector& to = sum[number(h)][w][c];
                    to = V::multiply_add(value, a.source + (c * kFirstLayerPoints + D * 16 + h * 4 + w) * lanes + tile,
                                         to);
                }
            }
        }
    }
    for_points([&](int, int, int, int place, vector& to)
                   __attribute__((always_inline)) { V::store(a.sums + place, to); });
}

// Heights that pass together.
constexpr int first_layer_heights(int channels) {
    return kVectorRegisters == 32 ? channels == 1 ? 4 : channels < 4 ? 2 : 1 : 1;
}

template <typename T, int Channels, int D>
void add_first_layer_depth(const FirstLayerProducts<T>& a) {
    constexpr int heights = first_layer_heights(Channels);
    if constexpr (heights == 4) add_first_layer_points<T, Channels, D, 15>(a);
    if constexpr (heights == 2) {
        add_first_layer_points<T, Channels, D, 9>(a);
        add_first_layer_points<T, Channels, D, 6>(a);
    }
    if constexpr (heights == 1) {
        add_first_layer_points<T, Channels, D, 1>(a);
        add_first_layer_points<T, Channels, D, 2>(a);
        add_first_layer_points<T, Channels, D, 4>(a);
        add_first_layer_points<T, Channels, D, 8>(a);
    }
}

// Adds the products of all points of a row of tiles.
template <typename T, int Channels>
void add_first_layer_products(const FirstLayerProducts<T>& a) {
    add_first_layer_depth<T, Channels, 1>(a);
    add_first_layer_depth<T, Channels, 0>(a);
    add_first_layer_depth<T, Channels, 2>(a);
    add_first_layer_depth<T, Channels, 3>(a);
}

}  // namespace
}  // namespace pvc
