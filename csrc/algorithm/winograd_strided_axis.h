// One axis of a convolution of three taps with stride 2, from fewer products.
//
// Two outputs see five source voxels,
//
//     y0 = w0 d0 + w1 d1 + w2 d2,     y1 = w0 d2 + w1 d3 + w2 d4.
//
// The even voxels meet w0 and w2 alone, a convolution of two taps with stride 1, which F(2, 2) makes from three
// products; the odd ones meet w1 alone. So five products take the place of six:
//
//     y0 = (d0 - d2) w0 + d1 w1 + d2 (w0 + w2),     y1 = d2 (w0 + w2) + d3 w1 + (d4 - d2) w2.
//
// On three axes that is 125 products for 216. All constants are 1 or -1: integers stay exact. For the gradient of the
// filter the same products are summed over tiles, those with w1 in one sum.
//
// In the gradient of the source, a source voxel of one parity meets w0 and w2, one of the other w1 alone. With an odd
// padding the first is of the latter kind; from three values of the gradient of the target,
//
//     x0 = w1 g0,     x1 = w2 g0 + w0 g1,     x2 = w1 g1,     x3 = w2 g1 + w0 g2,
//
// five products for six again:
//
//     x1 = (g0 - g1) w2 + g1 (w0 + w2),     x3 = g1 (w0 + w2) + (g2 - g1) w0.
#pragma once

#include "winograd_axis.h"

namespace pvc {
namespace {

// Kinds of WinogradAxis: of the convolution, and of the gradient of its source.
constexpr int kStrided = -2, kTransposed = -4;

template <>
struct WinogradAxis<kStrided> {
    static constexpr int outputs = 2, taps = 3, window = 5, advance = 4, points = 5, weights = 4;
    static constexpr PointProduct shared[] = {{2, 3, 0}}, apart[] = {{0, 0, 0}, {1, 1, 0}, {3, 1, 1}, {4, 2, 1}};

    template <typename V>
    static inline void source(V* v, int step) {
        const V d2 = v[2 * step];
        v[0] = v[0] - d2;
        v[4 * step] = v[4 * step] - d2;
    }

    template <typename V>
    static inline void weight(V* v, int step) {
        v[3 * step] = v[0] + v[2 * step];
    }

    template <typename V>
    static inline void interior(V* m, int step) {
        m[step] = m[0];
    }

    template <typename V>
    static inline void target(V* v, int step) {
        v[0] = v[0] + v[step] + v[2 * step];
        v[step] = v[2 * step] + v[3 * step] + v[4 * step];
    }

    template <typename V>
    static inline void gradient(V* v, int step) {
        const V y0 = v[0], y1 = v[step];
        v[step] = y0;
        v[2 * step] = y0 + y1;
        v[3 * step] = y1;
        v[4 * step] = y1;
    }

    template <typename V>
    static inline void weight_gradient(V* v, int step) {
        v[0] = v[0] + v[3 * step];
        v[2 * step] = v[2 * step] + v[3 * step];
    }
};

template <>
struct WinogradAxis<kTransposed> {
    static constexpr int outputs = 4, taps = 3, window = 3, advance = 2, points = 5, weights = 4;
    static constexpr PointProduct shared[] = {{2, 3, 1}}, apart[] = {{4, 0, 3}, {1, 1, 0}, {3, 1, 2}, {0, 2, 1}};

    template <typename V>
    static inline void source(V* v, int step) {
        const V g0 = v[0], g1 = v[step], g2 = v[2 * step];
        v[0] = g0 - g1;
        v[step] = g0;
        v[2 * step] = g1;
        v[3 * step] = g1;
        v[4 * step] = g2 - g1;
    }

    template <typename V>
    static inline void weight(V* v, int step) {
        WinogradAxis<kStrided>::weight(v, step);
    }

    template <typename V>
    static inline void interior(V* m, int step) {
        m[3 * step] = m[step];
    }

    template <typename V>
    static inline void target(V* v, int step) {
        const V x1 = v[0] + v[2 * step], x3 = v[2 * step] + v[4 * step];
        v[0] = v[step];
        v[step] = x1;
        v[2 * step] = v[3 * step];
        v[3 * step] = x3;
    }
};

}  // namespace
}  // namespace pvc
