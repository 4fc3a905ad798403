// A small matrix product with a register tile: target[row][column] = sum over k of source[row][k] * weight[k][column].
//
// The tile is that of broadcast.h, MR rows by NR vectors of columns, but rows are equally spaced and the sums start at
// zero. Where vectors have 64 bytes, the last may be half of one: 24 columns then cost three halves, not four, on
// processors that execute such a vector in two halves, and no more than two vectors on the others.
#pragma once

#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct PanelArguments {
    const T* source;
    int64_t source_pitch;
    const T* weight;  // [depth][columns]
    int64_t depth;
    T* target;
    int64_t target_pitch;
};

constexpr bool kHalfVectors = PVC_VECTOR_BYTES == 64;

template <typename T, bool Half>
struct PanelTail {
    typedef T type __attribute__((vector_size(PVC_VECTOR_BYTES / (Half ? 2 : 1))));
    typedef T unaligned __attribute__((vector_size(PVC_VECTOR_BYTES / (Half ? 2 : 1)), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = Vector<T>::lanes / (Half ? 2 : 1);
};

template <typename T, int MR, int NR, bool Half>
void panel_tile(const PanelArguments<T>& a) {
    using V = Vector<T>;
    using Tail = PanelTail<T, Half>;
    constexpr int whole = NR - 1, columns = whole * V::lanes + Tail::lanes;
    typename V::type sum[MR][NR] = {};
    typename Tail::type tail[MR] = {};
    const T* weights = a.weight;
    for (int64_t k = 0; k < a.depth; ++k, weights += columns) {
        typename V::type weight[NR];
#pragma GCC unroll 4
        for (int n = 0; n < whole; ++n) weight[n] = V::load(weights + n * V::lanes);
        const typename Tail::type last = *reinterpret_cast<const typename Tail::unaligned*>(weights + whole * V::lanes);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            const T value = a.source[m * a.source_pitch + k];
#pragma GCC unroll 4
            for (int n = 0; n < whole; ++n) sum[m][n] += value * weight[n];
            tail[m] += value * last;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
        T* to = a.target + m * a.target_pitch;
#pragma GCC unroll 4
        for (int n = 0; n < whole; ++n) V::store(to + n * V::lanes, sum[m][n]);
        *reinterpret_cast<typename Tail::unaligned*>(to + whole * V::lanes) = tail[m];
        // Readers of whole vectors find zeros.
        if constexpr (Half) {
            *reinterpret_cast<typename Tail::unaligned*>(to + whole * V::lanes + Tail::lanes) = typename Tail::type{};
        }
    }
}

constexpr int kPanelVectors = 3;

constexpr int panel_rows(int vectors) {
    if (kVectorRegisters == 32) return vectors == 3 ? 8 : 12;
    return vectors == 1 ? 8 : vectors == 2 ? 6 : 4;
}

template <typename T>
using PanelKernel = void (*)(const PanelArguments<T>&);

template <typename T, int MR, int NR, bool Half>
PanelKernel<T> panel_kernel_of(int64_t rows) {
    if (rows == MR) return panel_tile<T, MR, NR, Half>;
    if constexpr (MR > 1) return panel_kernel_of<T, MR - 1, NR, Half>(rows);
    return nullptr;
}

template <typename T, int NR>
PanelKernel<T> panel_kernel(int64_t rows, bool half) {
    if constexpr (kHalfVectors) {
        if (half) return panel_kernel_of<T, panel_rows(NR), NR, true>(rows);
    }
    return panel_kernel_of<T, panel_rows(NR), NR, false>(rows);
}

// All `rows` of a panel of `vectors` vectors, of which the last may be half.
template <typename T>
void compute_panel(int64_t vectors, bool half, int64_t rows, PanelArguments<T> a) {
    const int64_t most = panel_rows(static_cast<int>(vectors));
    while (rows > 0) {
        // What is left is shared by two tiles when one is not enough: few rows cannot hide the latency of an FMA.
        const int64_t now = rows >= 2 * most || rows == most ? most : rows > most ? (rows + 1) / 2 : rows;
        const PanelKernel<T> kernel = vectors == 1   ? panel_kernel<T, 1>(now, half)
                                      : vectors == 2 ? panel_kernel<T, 2>(now, half)
                                                     : panel_kernel<T, 3>(now, half);
        kernel(a);
        a.source += now * a.source_pitch;
        a.target += now * a.target_pitch;
        rows -= now;
    }
}

}  // namespace
}  // namespace pvc
