// The products of a Winograd convolution at all points of one axis, and that axis transformed back, in registers.
//
// For rows (tiles) r, columns (target channels) c and the points j of an axis with M outputs, product_j[r][c] = sum
// over k of source[r][j][k] * weight[j][k][c]. Some points take part in several outputs: the M interior points of F(M,
// 3) in all of them; the others, there zero and infinity, in one each (winograd_axis.h). So the products of the shared
// points are summed up in at most M register tiles, these are mixed into M outputs, and the products of the points
// apart are added where they belong:
//
//     target[i][r][c] = interior(shared products)[i] + sum of the products of the points that belong to output i alone
//
// A register tile is M times MR rows by NR vectors of columns. Where vectors have 64 bytes, the last may be half of
// one: 24 columns then cost three halves, not four, on processors that execute such a vector in two halves, and no more
// than two vectors on the others. There three vectors may take two elements k at once: neighbouring lanes hold both
// products of one column, and are added up at last (PairedTile).
#pragma once

#include "../algorithm/transpose.h"
#include "../algorithm/winograd_strided_axis.h"
#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct PanelArguments {
    const T* source;      // [chunk of `lanes` elements k][row][point][lane]
    int64_t chunk_pitch;  // between chunks
    int64_t depth;        // elements k
    const T* weight;      // [k][shared weight][column], then [k][weight apart][column]
    T* target;            // [output][row][column]
    int64_t output_pitch, row_pitch;
    bool paired;  // columns are one vector and a half, `depth` is even, weights are [k / 2][weight][column][k % 2]
};

template <int N>
constexpr int count_of(const PointProduct (&)[N]) {
    return N;
}

// The order of the weights of an axis: first those of shared points, as their products need them, then the others.
template <int Kind>
struct PanelWeights {
    using Axis = WinogradAxis<Kind>;
    static constexpr int shared_products = count_of(Axis::shared), apart_products = count_of(Axis::apart);
    static constexpr int distinct(const PointProduct* products, int count) {
        int weights = 1;
        for (int i = 1; i < count; ++i) weights += products[i].weight != products[i - 1].weight;
        return weights;
    }
    static constexpr int shared = distinct(Axis::shared, shared_products);
    static constexpr int apart = distinct(Axis::apart, apart_products);

    static constexpr bool is_shared(int weight) {
        for (const PointProduct& product : Axis::shared) {
            if (product.weight == weight) return true;
        }
        return false;
    }

    // Of a weight among the shared ones or those apart.
    static constexpr int row(int weight) {
        if (is_shared(weight)) return distinct_before(Axis::shared, weight);
        return distinct_before(Axis::apart, weight);
    }

    static constexpr int distinct_before(const PointProduct* products, int weight) {
        int i = 0;
        while (products[i].weight != weight) ++i;
        return distinct(products, i + 1) - 1;
    }
};

template <typename T, int Kind, int MR, int NR, bool Half>
class PanelTile {
    using Axis = WinogradAxis<Kind>;
    using V = Vector<T>;
    using Tail = VectorPart<T, Half>;
    static constexpr int M = Axis::outputs, row = Axis::points * V::lanes;
    static constexpr int whole = NR - 1, columns = whole * V::lanes + Tail::lanes;

    typename V::type sum_[M][MR][NR] = {};
    typename Tail::type tail_[M][MR] = {};

    template <bool Shared>
    __attribute__((always_inline)) inline const T* add(const PanelArguments<T>& a, const T* weights) {
        constexpr int products = Shared ? PanelWeights<Kind>::shared_products : PanelWeights<Kind>::apart_products;
        constexpr int rows = Shared ? PanelWeights<Kind>::shared : PanelWeights<Kind>::apart;
        const T* chunk = a.source;
        for (int64_t left = a.depth; left > 0; left -= V::lanes, chunk += a.chunk_pitch) {
            const T* end = chunk + (left < V::lanes ? left : V::lanes);
            for (const T* from = chunk; from < end; ++from, weights += rows * columns) {
#pragma GCC unroll 4
                for (int i = 0; i < products; ++i) {
                    const PointProduct product = (Shared ? Axis::shared : Axis::apart)[i];
                    const int output = product.output;
                    const T* vectors = weights + PanelWeights<Kind>::row(product.weight) * columns;
                    typename V::type weight[NR];
#pragma GCC unroll 4
                    for (int n = 0; n < whole; ++n) weight[n] = V::load(vectors + n * V::lanes);
                    const typename Tail::type last = Tail::load(vectors + whole * V::lanes);
#pragma GCC unroll 16
                    for (int m = 0; m < MR; ++m) {
                        const typename V::type value = V::broadcast(from + m * row + product.point * V::lanes);
#pragma GCC unroll 4
                        for (int n = 0; n < whole; ++n) sum_[output][m][n] += value * weight[n];
                        tail_[output][m] += Tail::first(value) * last;
                    }
                }
            }
        }
        return weights;
    }

  public:
    __attribute__((always_inline)) inline void run(const PanelArguments<T>& a) {
        const T* apart = add<true>(a, a.weight);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < whole; ++n) Axis::interior(&sum_[0][m][n], MR * NR);
            Axis::interior(&tail_[0][m], MR);
        }
        add<false>(a, apart);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
                T* to = a.target + i * a.output_pitch + m * a.row_pitch;
#pragma GCC unroll 4
                for (int n = 0; n < whole; ++n) V::store(to + n * V::lanes, sum_[i][m][n]);
                Tail::store(to + whole * V::lanes, tail_[i][m]);
            }
        }
    }
};

template <typename T, int Kind, int MR, int NR, bool Half>
void panel_tile(const PanelArguments<T>& a) {
    PanelTile<T, Kind, MR, NR, Half> tile;
    tile.run(a);
}

// Three vectors of two products for each of one and a half vectors of columns.
template <typename T, int Kind, int MR>
class PairedTile {
    using Axis = WinogradAxis<Kind>;
    using V = Vector<T>;
    using vector = typename V::type;
    using Half = VectorPart<T, kHalfVectors>;
    static constexpr int M = Axis::outputs, N = 3, row = Axis::points * V::lanes;

    vector sum_[M][MR][N] = {};

    template <bool Shared>
    __attribute__((always_inline)) inline const T* add(const PanelArguments<T>& a, const T* weights) {
        constexpr int products = Shared ? PanelWeights<Kind>::shared_products : PanelWeights<Kind>::apart_products;
        constexpr int rows = Shared ? PanelWeights<Kind>::shared : PanelWeights<Kind>::apart;
        const T* chunk = a.source;
        for (int64_t left = a.depth; left > 0; left -= V::lanes, chunk += a.chunk_pitch) {
            const T* end = chunk + (left < V::lanes ? left : V::lanes);
            for (const T* from = chunk; from < end; from += 2, weights += rows * N * V::lanes) {
#pragma GCC unroll 4
                for (int i = 0; i < products; ++i) {
                    const PointProduct product = (Shared ? Axis::shared : Axis::apart)[i];
                    const T* vectors = weights + PanelWeights<Kind>::row(product.weight) * N * V::lanes;
                    vector weight[N];
#pragma GCC unroll 3
                    for (int n = 0; n < N; ++n) weight[n] = V::load(vectors + n * V::lanes);
#pragma GCC unroll 16
                    for (int m = 0; m < MR; ++m) {
                        const vector pair = V::broadcast_pair(from + m * row + product.point * V::lanes);
#pragma GCC unroll 3
                        for (int n = 0; n < N; ++n) sum_[product.output][m][n] += pair * weight[n];
                    }
                }
            }
        }
        return weights;
    }

    // The sums of neighbouring lanes, first those of `a`.
    static inline vector add_pairs(vector a, vector b) {
        return Transpose<T>::template pick<EvenLanes>(a, b) + Transpose<T>::template pick<OddLanes>(a, b);
    }

  public:
    __attribute__((always_inline)) inline void run(const PanelArguments<T>& a) {
        const T* apart = add<true>(a, a.weight);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) Axis::interior(&sum_[0][m][n], MR * N);
        }
        add<false>(a, apart);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
            for (int m = 0; m < MR; m += 2) {
                const int next = m + 1 < MR ? m + 1 : m;
                T* to = a.target + i * a.output_pitch + m * a.row_pitch;
                V::store(to, add_pairs(sum_[i][m][0], sum_[i][m][1]));
                if (next > m) V::store(to + a.row_pitch, add_pairs(sum_[i][next][0], sum_[i][next][1]));
                const vector last = add_pairs(sum_[i][m][2], sum_[i][next][2]);
                typename Half::type halves[2];
                std::memcpy(halves, &last, sizeof(last));
                Half::store(to + V::lanes, halves[0]);
                if (next > m) Half::store(to + a.row_pitch + V::lanes, halves[1]);
            }
        }
    }
};

template <typename T, int Kind, int MR>
void paired_tile(const PanelArguments<T>& a) {
    PairedTile<T, Kind, MR> tile;
    tile.run(a);
}

constexpr int kPairedRows = 4;

// Vectors of columns of a register tile, and its rows. With M = 4 a weight would serve three rows if there were two
// vectors, and GCC 12 then loads it anew for each.
constexpr int panel_vectors(int outputs) { return outputs == 2 ? 2 : 1; }

constexpr int panel_rows(int outputs, int vectors) { return (kVectorRegisters == 32 ? 24 : 12) / outputs / vectors; }

template <typename T>
using PanelKernel = void (*)(const PanelArguments<T>&);

template <typename T, int Kind, int MR, int NR, bool Half>
PanelKernel<T> panel_kernel_of(int64_t rows) {
    if (rows == MR) return panel_tile<T, Kind, MR, NR, Half>;
    if constexpr (MR > 1) return panel_kernel_of<T, Kind, MR - 1, NR, Half>(rows);
    return nullptr;
}

template <typename T, int Kind, int NR>
PanelKernel<T> panel_kernel(int64_t rows, bool half) {
    constexpr int most = panel_rows(WinogradAxis<Kind>::outputs, NR);
    if constexpr (kHalfVectors) {
        if (half) return panel_kernel_of<T, Kind, most, NR, true>(rows);
    }
    return panel_kernel_of<T, Kind, most, NR, false>(rows);
}

// Whether an axis has panels that are paired.
constexpr bool has_paired_panels(int kind) { return kHalfVectors && kind == 2; }

template <typename T, int Kind, int MR = kPairedRows>
PanelKernel<T> paired_kernel(int64_t rows) {
    if (rows == MR) return paired_tile<T, Kind, MR>;
    if constexpr (MR > 1) return paired_kernel<T, Kind, MR - 1>(rows);
    return nullptr;
}

template <typename T, int Kind>
PanelKernel<T> panel_kernel(int64_t vectors, bool half, bool paired, int64_t rows) {
    if constexpr (has_paired_panels(Kind)) {
        if (paired) return paired_kernel<T, Kind>(rows);
    }
    if (vectors == 1) return panel_kernel<T, Kind, 1>(rows, half);
    return panel_kernel<T, Kind, panel_vectors(WinogradAxis<Kind>::outputs)>(rows, half);
}

// All `rows` of a panel of one or panel_vectors(outputs) vectors, of which the last may be half.
template <typename T, int Kind>
void compute_panel(int64_t vectors, bool half, int64_t rows, PanelArguments<T> a) {
    constexpr int M = WinogradAxis<Kind>::outputs;
    const int64_t most = a.paired ? kPairedRows : panel_rows(M, static_cast<int>(vectors));
    while (rows > 0) {
        // What is left is shared by two tiles when one is not enough: few rows cannot hide the latency of an FMA.
        const int64_t now = rows >= 2 * most || rows == most ? most : rows > most ? (rows + 1) / 2 : rows;
        panel_kernel<T, Kind>(vectors, half, a.paired, now)(a);
        a.source += now * WinogradAxis<Kind>::points * Vector<T>::lanes;
        a.target += now * a.row_pitch;
        rows -= now;
    }
}

}  // namespace
}  // namespace pvc
