// The register tile of the sparse weight gradient: S segments x V vectors of sums over one list of non-zero gradients.
//
//     sums[s][v] += sum over e < count of  values[e] * source[offsets[e] + segments[s] + v * lanes]
//
// One entry costs a scalar load, a broadcast and S * V FMAs with an operand in memory: bound by two loads per cycle,
// one FMA per cycle and unit but for the broadcast. The sums pass through memory once per list, so a list should be
// long. With fewer than 6 accumulators consecutive entries go to U sets of them, which hides the latency of an FMA.
#pragma once

#include "../isa.h"

namespace pvc {
namespace {

// Gradients that are not zero, and where they point, in elements of the source.
template <typename T>
struct SparseList {
    const T* values;
    const int32_t* offsets;
    int64_t count;
};

// `sums` are S * V vectors that follow one another.
template <typename T>
using SparseKernel = void (*)(SparseList<T> list, const T* source, const int32_t* segments, T* sums);

constexpr int kSparseVectors = 12;                                     // of a segment
constexpr int kSparseAccumulators = kVectorRegisters == 32 ? 28 : 12;  // of a tile
constexpr int kSparseSegments = kVectorRegisters == 32 ? 9 : 6;        // whose addresses fit general registers

// Half vectors of 64 bytes take half the time, and half the cache: offsets and segments, which count in whole vectors,
// are halved, and so is the distance between the vectors of a segment. The sums keep theirs.
constexpr bool kHalfSlices = PVC_VECTOR_BYTES == 64;
constexpr int kHalfSliceVectors = 3;

template <typename T, bool Half>
struct SliceVector {
    static constexpr int bytes = PVC_VECTOR_BYTES / (Half ? 2 : 1);
    typedef T type __attribute__((vector_size(bytes)));
    typedef T unaligned __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
    static inline type load(const T* from) { return *reinterpret_cast<const unaligned*>(from); }
    static inline void store(T* to, type value) { *reinterpret_cast<unaligned*>(to) = value; }
};

template <typename T, int S, int V, bool Half>
void sparse_tile(SparseList<T> list, const T* source, const int32_t* segments, T* sums) {
    using Slice = SliceVector<T, Half>;
    using vector = typename Slice::type;
    constexpr int lanes = Vector<T>::lanes, U = S * V >= 6 ? 1 : S * V >= 4 ? 2 : 4;
    constexpr int scale = Half ? 2 : 1;
    vector sum[U][S][V];
    const T* from[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
        from[s] = source + segments[s] / scale;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            sum[0][s][v] = Slice::load(sums + (s * V + v) * lanes);
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) sum[u][s][v] = vector{};
        }
    }
    const auto add = [&](int64_t e, vector(&to)[S][V]) __attribute__((always_inline)) {
        const T value = list.values[e];
        const int64_t offset = list.offsets[e] >> (scale - 1);
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) to[s][v] += value * Slice::load(from[s] + offset + v * (lanes / scale));
        }
    };
    int64_t e = 0;
    for (; e + U <= list.count; e += U) {
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) add(e + u, sum[u]);
    }
    if constexpr (U > 1) {
        for (; e < list.count; ++e) add(e, sum[0]);
    }
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            vector total = sum[0][s][v];
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) total += sum[u][s][v];
            Slice::store(sums + (s * V + v) * lanes, total);
        }
    }
}

// Segments that one tile of V vectors takes at most.
constexpr int sparse_segments(int64_t vectors) {
    const int fit = static_cast<int>(kSparseAccumulators / vectors);
    return fit < kSparseSegments ? fit : kSparseSegments;
}

template <typename T, int V, int S>
SparseKernel<T> sparse_tile_of(int64_t segments, bool half) {
    if (segments == S) {
        if constexpr (kHalfSlices && V <= kHalfSliceVectors) {
            if (half) return sparse_tile<T, S, V, true>;
        }
        return sparse_tile<T, S, V, false>;
    }
    if constexpr (S > 1) return sparse_tile_of<T, V, S - 1>(segments, half);
    return nullptr;
}

// `segments` from 1 to sparse_segments(vectors), `vectors` from 1 to kSparseVectors. `half`: vectors
// are half ones, where `vectors` is at most kHalfSliceVectors.
template <typename T, int V = kSparseVectors>
SparseKernel<T> sparse_kernel(int64_t segments, int64_t vectors, bool half) {
    if (vectors == V) return sparse_tile_of<T, V, sparse_segments(V)>(segments, half);
    if constexpr (V > 1) return sparse_kernel<T, V - 1>(segments, vectors, half);
    return nullptr;
}

}  // namespace
}  // namespace pvc
