// F(2x2x2, 3x3x3) of a few input channels: tiles of 2 x 2 x 2 outputs for one vector of output channels, products and
// transforms in registers.
//
// With one input channel the 64 products of a tile are not sums yet, so the additions of the transform A^T (. . .) A
// are as many as the multiplications and a plan that stores products first cannot pay. Here a product is born into the
// transform: of the four points along the depth
//
//     low = (m1 + m2) + u0 v0,     high = (m1 - m2) + u3 v3,     m = u v,
//
// takes four instructions of the multiplying and two of the adding kind, and with the width and the height a tile takes
// 64 and 80: less than half of the 216 FMAs of direct convolution, on processors that add beside the FMA. More channels
// make each product a sum and change nothing else. The bias enters as the start of the product at point (1, 1, 1),
// which is in all eight outputs with the factor 1.
//
// Point (d, h, w) is number (d * 4 + h) * 4 + w. Lanes are output channels; the transformed source is read one scalar
// per tile and point, tiles `lanes` to a vector (first_layer_source.h).
#pragma once

#include "../isa.h"
#include "../problem.h"

namespace pvc {
namespace {

// GCC finds the functions below too large to be inlined, and would then keep every tile in memory.
#define PVC_INLINE __attribute__((always_inline)) inline

constexpr int kFirstLayerPoints = 64;

// Where the same pipes add and multiply, additions cost as much as FMAs: 88 FMAs and 32 additions are then less than 64
// and 80.
constexpr bool kSpread = PVC_VECTOR_BYTES == 64;

// Tiles along the width that share the loads of the weights: 8 outputs each, and as many registers again for the sums.
constexpr int kFirstLayerTiles = kVectorRegisters == 32 ? 2 : 1;

template <typename T>
struct FirstLayerArguments {
    const T* source;  // [channel][point][lanes], from the first tile on
    const T* weight;  // [channel][point][lanes]
    const T* bias;    // [lanes]
    int64_t channels;
};

// The outputs of kFirstLayerTiles tiles, (d * 2 + h) * 2 + w.
template <typename T>
struct FirstLayerOutputs {
    typename Vector<T>::type of[8][kFirstLayerTiles];
};

// `Channels` is the number of input channels, or 0 where it is known at run time.
template <typename T, int Channels>
struct FirstLayerTile {
    using V = Vector<T>;
    using vector = typename V::type;
    static constexpr int lanes = V::lanes, tiles = kFirstLayerTiles;

    struct Pair {
        vector of[2][tiles];
    };
    struct Plane {  // [depth][width]
        vector of[2][2][tiles];
    };

    // The products at point d of line (h, w).
    PVC_INLINE static void multiply(const FirstLayerArguments<T>& a, int point, vector* sum) {
        const vector weight = V::load(a.weight + point * lanes);
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) sum[t] = V::multiply(weight, a.source + point * lanes + t);
    }

    PVC_INLINE static void accumulate(const FirstLayerArguments<T>& a, int point, vector* sum) {
        const vector weight = V::load(a.weight + point * lanes);
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) sum[t] = V::multiply_add(weight, a.source + point * lanes + t, sum[t]);
    }

    // A point that both outputs along the depth take part of, with a sign if `Minus` in the higher one.
    template <bool Minus>
    PVC_INLINE static void spread(const FirstLayerArguments<T>& a, int point, vector* low, vector* high) {
        const vector weight = V::load(a.weight + point * lanes);
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) {
            const vector value = V::broadcast(a.source + point * lanes + t);
            low[t] += weight * value;
            high[t] = Minus ? high[t] - weight * value : high[t] + weight * value;
        }
    }

    PVC_INLINE static int64_t channels_of(const FirstLayerArguments<T>& a) {
        return Channels == 0 ? a.channels : Channels;
    }

    PVC_INLINE static FirstLayerArguments<T> next_channel(FirstLayerArguments<T> a) {
        a.source += kFirstLayerPoints * lanes;
        a.weight += kFirstLayerPoints * lanes;
        return a;
    }

    // The outputs along the depth of the four points of line w of a row; `start` is added to all of them.
    PVC_INLINE static Pair line(const FirstLayerArguments<T>& a, int w, const vector* start) {
        vector m1[tiles], m2[tiles];
        if (start != nullptr) {
#pragma GCC unroll 2
            for (int t = 0; t < tiles; ++t) m1[t] = *start;
            accumulate(a, w + 16, m1);
        } else {
            multiply(a, w + 16, m1);
        }
        if constexpr (kSpread && Channels == 1) {
            Pair pair;
#pragma GCC unroll 2
            for (int t = 0; t < tiles; ++t) pair.of[0][t] = pair.of[1][t] = m1[t];
            spread<true>(a, w + 32, pair.of[0], pair.of[1]);
            accumulate(a, w, pair.of[0]);
            accumulate(a, w + 48, pair.of[1]);
            return pair;
        }
        multiply(a, w + 32, m2);
        if constexpr (Channels != 1) {
            FirstLayerArguments<T> c = a;
#pragma GCC unroll 4
            for (int64_t i = 1; i < channels_of(a); ++i) {
                c = next_channel(c);
                accumulate(c, w + 16, m1);
                accumulate(c, w + 32, m2);
            }
        }
        Pair pair;
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) {
            pair.of[0][t] = m1[t] + m2[t];
            pair.of[1][t] = m1[t] - m2[t];
        }
        accumulate(a, w, pair.of[0]);
        accumulate(a, w + 48, pair.of[1]);
        if constexpr (Channels != 1) {
            FirstLayerArguments<T> c = a;
#pragma GCC unroll 4
            for (int64_t i = 1; i < channels_of(a); ++i) {
                c = next_channel(c);
                accumulate(c, w, pair.of[0]);
                accumulate(c, w + 48, pair.of[1]);
            }
        }
        return pair;
    }

    PVC_INLINE static void join(const FirstLayerArguments<T>& a, int w, vector* low, vector* high) {
        if constexpr (kSpread && Channels == 1) {
            spread<false>(a, w + 16, low, high);
            spread<true>(a, w + 32, low, high);
            accumulate(a, w, low);
            accumulate(a, w + 48, high);
            return;
        }
        const Pair pair = line(a, w, nullptr);
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) {
            low[t] += pair.of[0][t];
            high[t] += pair.of[1][t];
        }
    }

    // The outputs along depth and width of the sixteen points of a row.
    PVC_INLINE static Plane plane(const FirstLayerArguments<T>& a, vector start) {
        Plane plane;
        const Pair one = line(a, 1, &start), two = line(a, 2, nullptr);
#pragma GCC unroll 2
        for (int d = 0; d < 2; ++d) {
#pragma GCC unroll 2
            for (int t = 0; t < tiles; ++t) {
                plane.of[d][0][t] = one.of[d][t] + two.of[d][t];
                plane.of[d][1][t] = one.of[d][t] - two.of[d][t];
            }
        }
        join(a, 0, plane.of[0][0], plane.of[1][0]);
        join(a, 3, plane.of[0][1], plane.of[1][1]);
        return plane;
    }

    // A row of points is summed on its own before it is added to the outputs, a tenth faster than line by line.
    PVC_INLINE static FirstLayerOutputs<T> compute(const FirstLayerArguments<T>& a) {
        FirstLayerOutputs<T> y;
        vector start = V::load(a.bias);
#pragma GCC unroll 1
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? i + 1 : i == 2 ? 0 : 3;
            FirstLayerArguments<T> of_row = a;
            of_row.source += row * 4 * lanes;
            of_row.weight += row * 4 * lanes;
            const Plane p = plane(of_row, start);
            start = vector{};
            const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
                    for (int t = 0; t < tiles; ++t) {
                        body(y.of[j / 2 * 4 + j % 2][t], y.of[j / 2 * 4 + 2 + j % 2][t], p.of[j / 2][j % 2][t]);
                    }
                }
            };
            if (i == 0) {
                each([](vector& low, vector& high, vector value)
                         __attribute__((always_inline)) { low = high = value; });
            } else if (i == 1) {
                each([](vector& low, vector& high, vector value)
                         __attribute__((always_inline)) { low += value, high -= value; });
            } else if (i == 2) {
                each([](vector& low, vector&, vector value) __attribute__((always_inline)) { low += value; });
            } else {
                each([](vector&, vector& high, vector value) __attribute__((always_inline)) { high += value; });
            }
        }
        return y;
    }
};

// The largest of eight outputs, at least zero, and its number; of equal ones the first, kNoVoxel where none is
// positive. No output is NaN.
template <typename T>
struct FirstLayerPool {
    using vector = typename Vector<T>::type;
    using integers = typename VectorType<T>::integers;
    vector value;
    integers code;

    PVC_INLINE static FirstLayerPool of(const vector* y, int step) {
        vector best[4];
        integers code[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const vector first = i == 0 ? (y[0] > T(0) ? y[0] : vector{}) : y[2 * i * step];
            const vector second = y[(2 * i + 1) * step];
            const integers later = second > first;
            best[i] = later ? second : first;
            code[i] = later ? integers{} + 1 : integers{};
        }
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            const integers later = best[i + 1] > best[i];
            best[i] = later ? best[i + 1] : best[i];
            code[i] = later ? code[i + 1] | 2 : code[i];
        }
        const integers later = best[2] > best[0];
        const vector largest = later ? best[2] : best[0];
        const integers number = later ? code[2] | 4 : code[0];
        return {largest, largest > T(0) ? number : integers{} + kNoVoxel};
    }

    PVC_INLINE static vector value_of(const vector* y, int step) {
        vector largest = {};
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) largest = y[i * step] > largest ? y[i * step] : largest;
        return largest;
    }
};

}  // namespace
}  // namespace pvc
