// One axis of a Winograd convolution F(m, 3): m outputs of a filter of three taps from m + 2 products. Those with a
// stride are in winograd_strided_axis.h.
//
// S. Winograd, "Arithmetic Complexity of Computations" (1980), in the form of A. Lavin and S. Gray, "Fast Algorithms
// for Convolutional Neural Networks" (2016): y = A^T [(G g) * (B^T d)]. With interpolation points a_j, one of them
// infinity, M_j(x) = product over l != j of (x - a_l) and N_j = M_j(a_j):
//
//     B^T row j: coefficients of M_j (of the product of all x - a_l for infinity),
//     G row j:   (1, a_j, a_j^2) / N_j,   (0, 0, 1) for infinity,
//     A^T[i][j]: a_j^i,   1 in the last row for infinity.
//
// F(2, 3) takes the points 0, 1, -1: all of its constants are powers of two, so that small integers stay exact.
// F(4, 3) takes 0, 1, -1, 1/2, -2. Reciprocal points with opposite signs keep the constants small and of mixed sign:
// B. Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution" (2020); the textbook's
// 0, 1, -1, 2, -2 loses about twice as much. Identity serves an axis of one tap.
//
// The gradient of the filter follows from that of y: dg = G^T [(A dy) * (B^T d)]. `gradient` is A, `weight_gradient` is
// G^T,
// from the sums that belong to the transformed weights.
//
// The functions transform `step`-spaced values in place; `interior` is the part of `target` that all points but zero
// and infinity have in all outputs. V is a scalar or a vector.
//
// A tile reads `window` source voxels; that of the next tile begins `advance` further on. panel.h adds up the products
// of the `shared` points, applies `interior`, and adds those of the points `apart`.
#pragma once

#include <cstdint>

namespace pvc {
namespace {

// Point `point` times transformed weight `weight`, added to sum `output`. Both lists are sorted by weight.
struct PointProduct {
    int point, weight, output;
};

// `Kind` is the number of outputs of stride 1.
template <int Kind>
struct WinogradAxis;

template <>
struct WinogradAxis<1> {
    static constexpr int outputs = 1, taps = 1, window = 1, advance = 1, points = 1, weights = 1;

    template <typename V>
    static inline void source(V*, int) {}
    template <typename V>
    static inline void weight(V*, int) {}
    template <typename V>
    static inline void target(V*, int) {}
    template <typename V>
    static inline void gradient(V*, int) {}
    template <typename V>
    static inline void weight_gradient(V*, int) {}
};

template <>
struct WinogradAxis<2> {
    static constexpr int outputs = 2, taps = 3, window = 4, advance = 2, points = 4, weights = 4;
    static constexpr PointProduct shared[] = {{1, 1, 0}, {2, 2, 1}}, apart[] = {{0, 0, 0}, {3, 3, 1}};

    template <typename V>
    static inline void source(V* v, int step) {
        const V d0 = v[0], d1 = v[step], d2 = v[2 * step], d3 = v[3 * step];
        v[0] = d0 - d2;
        v[step] = d1 + d2;
        v[2 * step] = d2 - d1;
        v[3 * step] = d3 - d1;
    }

    template <typename V>
    static inline void weight(V* v, int step) {
        const V even = v[0] + v[2 * step], g1 = v[step], g2 = v[2 * step];
        v[step] = (even + g1) / 2;
        v[2 * step] = (even - g1) / 2;
        v[3 * step] = g2;
    }

    template <typename V>
    static inline void interior(V* m, int step) {
        const V m1 = m[0], m2 = m[step];
        m[0] = m1 + m2;
        m[step] = m1 - m2;
    }

    template <typename V>
    static inline void target(V* v, int step) {
        interior(v + step, step);
        v[0] = v[0] + v[step];
        v[step] = v[2 * step] + v[3 * step];
    }

    template <typename V>
    static inline void gradient(V* v, int step) {
        const V y0 = v[0], y1 = v[step];
        v[step] = y0 + y1;
        v[2 * step] = y0 - y1;
        v[3 * step] = y1;
    }

    template <typename V>
    static inline void weight_gradient(V* v, int step) {
        const V sum = (v[step] + v[2 * step]) / 2, difference = (v[step] - v[2 * step]) / 2;
        v[0] = v[0] + sum;
        v[step] = difference;
        v[2 * step] = v[3 * step] + sum;
    }
};

template <>
struct WinogradAxis<4> {
    static constexpr int outputs = 4, taps = 3, window = 6, advance = 4, points = 6, weights = 6;
    static constexpr PointProduct shared[] = {{1, 1, 0}, {2, 2, 1}, {3, 3, 2}, {4, 4, 3}},
                                  apart[] = {{0, 0, 0}, {5, 5, 3}};

    template <typename V>
    static inline void source(V* v, int step) {
        const V d0 = v[0], d1 = v[step], d2 = v[2 * step], d3 = v[3 * step], d4 = v[4 * step], d5 = v[5 * step];
        const V a = d3 - d1, b = d4 - d2;
        v[0] = d0 - d2 + b + a * 1.5f;
        v[step] = d4 + d2 * 0.5f + (d3 * 2.5f - d1);
        v[2 * step] = d4 - d2 * 2.5f + (d3 * 0.5f + d1);
        v[3 * step] = b + a * 2;
        v[4 * step] = b - a * 0.5f;
        v[5 * step] = d5 - d3 - a + b * 1.5f;
    }

    template <typename V>
    static inline void weight(V* v, int step) {
        const V g0 = v[0], g1 = v[step], g2 = v[2 * step], even = g0 + g2;
        v[step] = (even + g1) / 3;
        v[2 * step] = (g1 - even) / 3;
        v[3 * step] = (g0 * 4 + g1 * 2 + g2) * -4 / 15;
        v[4 * step] = (g0 - g1 * 2 + g2 * 4) / 15;
        v[5 * step] = g2;
    }

    template <typename V>
    static inline void interior(V* m, int step) {
        const V m3 = m[2 * step], m4 = m[3 * step];
        const V sum = m[0] + m[step], difference = m[0] - m[step];
        m[0] = sum + (m3 + m4);
        m[step] = difference + m3 * 0.5f - m4 * 2;
        m[2 * step] = sum + m3 * 0.25f + m4 * 4;
        m[3 * step] = difference + m3 * 0.125f - m4 * 8;
    }

    template <typename V>
    static inline void target(V* v, int step) {
        interior(v + step, step);
        v[0] = v[0] + v[step];
        v[step] = v[2 * step];
        v[2 * step] = v[3 * step];
        v[3 * step] = v[4 * step] + v[5 * step];
    }
};

// Products of a plane, those of neighbouring points `point` apart in memory, transformed back along its first axis P.
template <typename P, typename Q, typename V, typename T>
__attribute__((always_inline)) inline void transform_columns(const T* from, int64_t point, typename V::type* v) {
#pragma GCC unroll 6
    for (int q = 0; q < Q::points; ++q) {
#pragma GCC unroll 6
        for (int p = 0; p < P::points; ++p) v[p * Q::points + q] = V::load(from + (p * Q::points + q) * point);
        P::target(v + q, Q::points);
    }
}

}  // namespace
}  // namespace pvc
