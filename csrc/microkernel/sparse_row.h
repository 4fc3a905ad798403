// The register tile of the sparse input gradient: S rows x 3 columns x V vectors of sums that move along a row.
//
//     sums[s * row_pitch + (w + k) * voxel_pitch + v] += sum over e in list w of
//         entries[e].value * weights[entries[e].offset + s * weight_pitch + k * voxel_pitch + v]
//
// for three neighbouring taps k. The lists of one row follow one another: a column leaves the registers, to be added to
// memory, when its third list is done. So the sums of a list never wait for a store of the list before, and one list
// costs S * V loads and stores instead of three times as many.
#pragma once

#include "../isa.h"
#include "sparse_sum.h"

namespace pvc {
namespace {

// A gradient that is not zero, and where it points, in elements of the weights.
template <typename T>
struct SparseEntry {
    T value;
    int32_t offset;
};

// List w holds the entries begins[w * list_pitch] .. ends[w * list_pitch] - 1.
template <typename T>
struct SparseRow {
    const SparseEntry<T>* entries;
    const int32_t *begins, *ends;
    int64_t list_pitch, count;
    const T* weights;
    int64_t weight_pitch;
    T* sums;
    int64_t row_pitch, voxel_pitch;
};

constexpr int kRowTaps = 3, kRowSegments = 3, kRowVectors = kVectorRegisters == 32 ? 3 : 1;

template <typename T, int S, int V>
void sparse_row_tile(const SparseRow<T>& row) {
    using vector = typename Vector<T>::type;
    constexpr int lanes = Vector<T>::lanes, K = kRowTaps;
    vector sum[S][K][V] = {};
    const T* weights[S];
    for (int s = 0; s < S; ++s) weights[s] = row.weights + s * row.weight_pitch;
    T* to = row.sums;
    const auto retire = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                T* at = to + s * row.row_pitch + v * lanes;
                Vector<T>::store(at, Vector<T>::load(at) + sum[s][0][v]);
#pragma GCC unroll 4
                for (int k = 1; k < K; ++k) sum[s][k - 1][v] = sum[s][k][v];
                sum[s][K - 1][v] = vector{};
            }
        }
        to += row.voxel_pitch;
    };
    for (int64_t w = 0; w < row.count; ++w) {
        const SparseEntry<T>* entry = row.entries + row.begins[w * row.list_pitch];
        const SparseEntry<T>* end = row.entries + row.ends[w * row.list_pitch];
        for (; entry != end; ++entry) {
            const T value = entry->value;
            const int64_t offset = entry->offset;
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
                for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) {
                        sum[s][k][v] += value * Vector<T>::load(weights[s] + offset + k * row.voxel_pitch + v * lanes);
                    }
                }
            }
        }
        retire();
    }
    for (int k = 1; k < K; ++k) retire();
}

template <typename T>
using SparseRowKernel = void (*)(const SparseRow<T>&);

template <typename T, int V>
SparseRowKernel<T> sparse_row_kernel_of(int64_t segments) {
    if (segments == 3) return sparse_row_tile<T, 3, V>;
    if (segments == 2) return sparse_row_tile<T, 2, V>;
    return sparse_row_tile<T, 1, V>;
}

// `segments` from 1 to kRowSegments, `vectors` from 1 to kRowVectors.
template <typename T>
SparseRowKernel<T> sparse_row_kernel(int64_t segments, int64_t vectors) {
    if constexpr (kRowVectors > 1) {
        if (vectors == 2) return sparse_row_kernel_of<T, 2>(segments);
        if (vectors == 3) return sparse_row_kernel_of<T, 3>(segments);
    }
    return sparse_row_kernel_of<T, 1>(segments);
}

}  // namespace
}  // namespace pvc
