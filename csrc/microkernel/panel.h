// The products of a Winograd convolution at all points of one axis, and that axis transformed back, in registers.
//
// For rows (tiles) r, columns (target channels) c and the points j of F(M, 3), product_j[r][c] = sum over k of
// source[r][j][k] * weight[j][k][c]. The M interior points take part in every output; zero and infinity, the first and
// last point, in one each (winograd_axis.h). So the interior products are summed up in M register tiles, these are
// mixed into M outputs, and the products of the two ends are added where they belong:
//
//     target[i][r][c] = interior(product_1, ..., product_M)[i] + (i == 0 ? product_0 : 0)
//                                                              + (i == M - 1 ? product_{M + 1} : 0)
//
// A register tile is M times MR rows by NR vectors of columns. Where vectors have 64 bytes, the last may be half of
// one: 24 columns then cost three halves, not four, on processors that execute such a vector in two halves, and no more
// than two vectors on the others.
#pragma once

#include "../algorithm/winograd_axis.h"
#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct PanelArguments {
    const T* source;      // [chunk of `lanes` elements k][row][point][lane]
    int64_t chunk_pitch;  // between chunks
    int64_t depth;        // elements k
    const T* weight;      // [k][interior point][column], then [k][end][column]
    T* target;            // [output][row][column]
    int64_t output_pitch, row_pitch;
};

template <typename T, int M, int MR, int NR, bool Half>
class PanelTile {
    using V = Vector<T>;
    using Tail = VectorPart<T, Half>;
    static constexpr int whole = NR - 1, columns = whole * V::lanes + Tail::lanes, row = (M + 2) * V::lanes;

    typename V::type sum_[M][MR][NR] = {};
    typename Tail::type tail_[M][MR] = {};

    // Adds the products of `Points` points: number `First + i * Step` to output i * (M - 1) / (Points - 1).
    template <int Points, int First, int Step>
    __attribute__((always_inline)) inline const T* add(const PanelArguments<T>& a, const T* weights) {
        const T* chunk = a.source;
        for (int64_t left = a.depth; left > 0; left -= V::lanes, chunk += a.chunk_pitch) {
            const T* end = chunk + (left < V::lanes ? left : V::lanes);
            for (const T* from = chunk; from < end; ++from, weights += Points * columns) {
#pragma GCC unroll 4
                for (int i = 0; i < Points; ++i) {
                    const int output = i * (M - 1) / (Points - 1);
                    const T* vectors = weights + i * columns;
                    typename V::type weight[NR];
#pragma GCC unroll 4
                    for (int n = 0; n < whole; ++n) weight[n] = V::load(vectors + n * V::lanes);
                    const typename Tail::type last = Tail::load(vectors + whole * V::lanes);
#pragma GCC unroll 16
                    for (int m = 0; m < MR; ++m) {
                        const T value = from[m * row + (First + i * Step) * V::lanes];
#pragma GCC unroll 4
                        for (int n = 0; n < whole; ++n) sum_[output][m][n] += value * weight[n];
                        tail_[output][m] += value * last;
                    }
                }
            }
        }
        return weights;
    }

  public:
    __attribute__((always_inline)) inline void run(const PanelArguments<T>& a) {
        const T* ends = add<M, 1, 1>(a, a.weight);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < whole; ++n) WinogradAxis<M>::interior(&sum_[0][m][n], MR * NR);
            WinogradAxis<M>::interior(&tail_[0][m], MR);
        }
        add<2, 0, M + 1>(a, ends);
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

template <typename T, int M, int MR, int NR, bool Half>
void panel_tile(const PanelArguments<T>& a) {
    PanelTile<T, M, MR, NR, Half> tile;
    tile.run(a);
}

// Vectors of columns of a register tile, and its rows. With M = 4 a weight would serve three rows if there were two
// vectors, and GCC 12 then loads it anew for each.
constexpr int panel_vectors(int outputs) { return outputs == 2 ? 2 : 1; }

constexpr int panel_rows(int outputs, int vectors) { return (kVectorRegisters == 32 ? 24 : 12) / outputs / vectors; }

template <typename T>
using PanelKernel = void (*)(const PanelArguments<T>&);

template <typename T, int M, int MR, int NR, bool Half>
PanelKernel<T> panel_kernel_of(int64_t rows) {
    if (rows == MR) return panel_tile<T, M, MR, NR, Half>;
    if constexpr (MR > 1) return panel_kernel_of<T, M, MR - 1, NR, Half>(rows);
    return nullptr;
}

template <typename T, int M, int NR>
PanelKernel<T> panel_kernel(int64_t rows, bool half) {
    if constexpr (kHalfVectors) {
        if (half) return panel_kernel_of<T, M, panel_rows(M, NR), NR, true>(rows);
    }
    return panel_kernel_of<T, M, panel_rows(M, NR), NR, false>(rows);
}

// All `rows` of a panel of one or panel_vectors(M) vectors, of which the last may be half.
template <typename T, int M>
void compute_panel(int64_t vectors, bool half, int64_t rows, PanelArguments<T> a) {
    const int64_t most = panel_rows(M, static_cast<int>(vectors));
    while (rows > 0) {
        // What is left is shared by two tiles when one is not enough: few rows cannot hide the latency of an FMA.
        const int64_t now = rows >= 2 * most || rows == most ? most : rows > most ? (rows + 1) / 2 : rows;
        const PanelKernel<T> kernel =
            vectors == 1 ? panel_kernel<T, M, 1>(now, half) : panel_kernel<T, M, panel_vectors(M)>(now, half);
        kernel(a);
        a.source += now * (M + 2) * Vector<T>::lanes;
        a.target += now * a.row_pitch;
        rows -= now;
    }
}

}  // namespace
}  // namespace pvc
