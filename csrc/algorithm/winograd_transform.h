// The three transforms of a 3-D tile, F(m_d) x F(m_h) x F(m_w), for a vector of channels at a time.
//
// A tile has p_d * p_h * p_w points, (d, h, w) with w innermost; the values of one point lie `point` elements apart.
#pragma once

#include "../vector.h"
#include "winograd_axis.h"

namespace pvc {
namespace {

// Pointers and strides of one tile and one vector of channels, in elements.
template <typename T>
struct TileTransform {
    const T* from;
    int64_t from_stride[3];
    T* to;
    int64_t to_stride[3];
    int64_t point;  // between points, in `to` for source and weight, in `from` for target
};

template <typename T, int D, int H, int W>
struct WinogradTile {
    using V = Vector<T>;
    using vector = typename V::type;
    using AxisD = WinogradAxis<D>;
    using AxisH = WinogradAxis<H>;
    using AxisW = WinogradAxis<W>;
    static constexpr int P0 = AxisD::points, P1 = AxisH::points, P2 = AxisW::points;

    static void source(const TileTransform<T>& a) {
        vector v[P0 * P1 * P2];
        for (int d = 0; d < P0; ++d) {
            vector* plane = v + d * P1 * P2;
            for (int h = 0; h < P1; ++h) {
                const T* from = a.from + d * a.from_stride[0] + h * a.from_stride[1];
                vector row[P2];
#pragma GCC unroll 6
                for (int w = 0; w < P2; ++w) row[w] = V::load(from + w * a.from_stride[2]);
                AxisW::source(row, 1);
#pragma GCC unroll 6
                for (int w = 0; w < P2; ++w) plane[h * P2 + w] = row[w];
            }
#pragma GCC unroll 6
            for (int w = 0; w < P2; ++w) AxisH::source(plane + w, P2);
        }
        for (int i = 0; i < P1 * P2; ++i) {
            vector column[P0];
#pragma GCC unroll 6
            for (int d = 0; d < P0; ++d) column[d] = v[d * P1 * P2 + i];
            AxisD::source(column, 1);
#pragma GCC unroll 6
            for (int d = 0; d < P0; ++d) V::store(a.to + (d * P1 * P2 + i) * a.point, column[d]);
        }
    }

    static void weight(const TileTransform<T>& a) {
        vector v[P0 * P1 * P2];
        for (int d = 0; d < AxisD::taps; ++d) {
            for (int h = 0; h < AxisH::taps; ++h) {
                vector* row = v + (d * P1 + h) * P2;
                for (int w = 0; w < AxisW::taps; ++w) {
                    row[w] = V::load(a.from + d * a.from_stride[0] + h * a.from_stride[1] + w * a.from_stride[2]);
                }
                AxisW::weight(row, 1);
            }
            for (int w = 0; w < P2; ++w) AxisH::weight(v + d * P1 * P2 + w, P2);
        }
        for (int i = 0; i < P1 * P2; ++i) AxisD::weight(v + i, P1 * P2);
        for (int i = 0; i < P0 * P1 * P2; ++i) V::store(a.to + i * a.point, v[i]);
    }

    // Adds `initial` and returns whether each lane's outputs are all finite: 0 where they are, -1 where not.
    static typename VectorType<T>::integers target(const TileTransform<T>& a, vector initial) {
        vector v[D * P1 * P2];
        for (int i = 0; i < P1 * P2; ++i) {
            vector column[P0];
#pragma GCC unroll 6
            for (int d = 0; d < P0; ++d) column[d] = V::load(a.from + (d * P1 * P2 + i) * a.point);
            AxisD::target(column, 1);
#pragma GCC unroll 4
            for (int d = 0; d < D; ++d) v[d * P1 * P2 + i] = column[d];
        }
        vector spoilt = {};
        for (int d = 0; d < D; ++d) {
            vector* plane = v + d * P1 * P2;
#pragma GCC unroll 6
            for (int w = 0; w < P2; ++w) AxisH::target(plane + w, P2);
            for (int h = 0; h < H; ++h) {
                vector row[P2];
                T* to = a.to + d * a.to_stride[0] + h * a.to_stride[1];
#pragma GCC unroll 6
                for (int w = 0; w < P2; ++w) row[w] = plane[h * P2 + w];
                AxisW::target(row, 1);
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) {
                    const vector value = row[w] + initial;
                    spoilt += value - value;  // zero, or NaN for good once a value is infinite or NaN
                    V::store(to + w * a.to_stride[2], value);
                }
            }
        }
        return spoilt != spoilt;
    }
};

// The transforms of one scheme.
template <typename T>
struct WinogradTransforms {
    int outputs[3], points[3];
    void (*source)(const TileTransform<T>&);
    void (*weight)(const TileTransform<T>&);
    typename VectorType<T>::integers (*target)(const TileTransform<T>&, typename Vector<T>::type);

    int64_t count() const { return points[0] * points[1] * points[2]; }
};

template <typename T, int D, int H, int W>
constexpr WinogradTransforms<T> winograd_transforms_of() {
    using Tile = WinogradTile<T, D, H, W>;
    return {{D, H, W}, {Tile::P0, Tile::P1, Tile::P2}, Tile::source, Tile::weight, Tile::target};
}

// The scheme with these outputs per axis, or null when there is none.
template <typename T>
const WinogradTransforms<T>* winograd_transforms(const int64_t outputs[3]) {
    static constexpr WinogradTransforms<T> schemes[] = {
        winograd_transforms_of<T, 2, 2, 2>(), winograd_transforms_of<T, 2, 2, 4>(),
        winograd_transforms_of<T, 2, 4, 4>(), winograd_transforms_of<T, 4, 4, 4>(),
        winograd_transforms_of<T, 1, 2, 2>(), winograd_transforms_of<T, 1, 2, 4>(),
        winograd_transforms_of<T, 1, 4, 4>(), winograd_transforms_of<T, 2, 1, 1>(),
        winograd_transforms_of<T, 4, 1, 1>(),
    };
    for (const WinogradTransforms<T>& scheme : schemes) {
        if (scheme.outputs[0] == outputs[0] && scheme.outputs[1] == outputs[1] && scheme.outputs[2] == outputs[2]) {
            return &scheme;
        }
    }
    return nullptr;
}

}  // namespace
}  // namespace pvc
