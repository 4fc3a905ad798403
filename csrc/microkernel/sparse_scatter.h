// The register tile of the sparse input gradient where sparse_row.h does not apply: S segments x V vectors of sums
// over one list of non-zero gradients.
//
//     sums[s * pitch][v] += sum over e < count of  entries[e].value * source[entries[e].offset + segments[s] + v *
//     lanes]
//
// One entry costs a scalar load, a broadcast and S * V FMAs with an operand in memory: bound by two loads per cycle,
// one FMA per cycle and unit but for the broadcast. The sums pass through memory once per list, so a list should be
// long. With fewer than 6 accumulators consecutive entries go to U sets of them, which hides the latency of an FMA.
#pragma once

#include "sparse_row.h"

namespace pvc {
namespace {

// The non-zero gradients of one output column.
template <typename T>
struct EntryList {
    const SparseEntry<T>* entries;
    int64_t count;
};

// The sums of segment s begin at sums + s * pitch. Of the last vector of each, the first `kept` lanes are changed.
template <typename T>
using ScatterKernel = void (*)(const EntryList<T>& list, const T* source, const int32_t* segments, T* sums,
                               int64_t pitch, int64_t kept);

constexpr int kScatterVectors = 12;  // accumulators of one tile
constexpr int kScatterSegments = 6;

template <typename T>
struct LaneNumbers {
    typename Vector<T>::type value;
    LaneNumbers() {
        for (int i = 0; i < Vector<T>::lanes; ++i) value[i] = static_cast<T>(i);
    }
};

template <typename T, int S, int V>
void scatter_tile(const EntryList<T>& list, const T* source, const int32_t* segments, T* sums, int64_t pitch,
                  int64_t kept) {
    using vector = typename Vector<T>::type;
    constexpr int lanes = Vector<T>::lanes, U = S * V >= 6 ? 1 : S * V >= 4 ? 2 : 4;
    vector sum[U][S][V];
    const T* from[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
        from[s] = source + segments[s];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            sum[0][s][v] = Vector<T>::load(sums + s * pitch + v * lanes);
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) sum[u][s][v] = vector{};
        }
    }
    const auto add = [&](int64_t entry, vector(&to)[S][V]) __attribute__((always_inline)) {
        const T value = list.entries[entry].value;
        const int64_t offset = list.entries[entry].offset;
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) to[s][v] += value * Vector<T>::load(from[s] + offset + v * lanes);
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
    const auto keep = LaneNumbers<T>().value < static_cast<T>(kept);
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            vector total = sum[0][s][v];
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) total += sum[u][s][v];
            T* to = sums + s * pitch + v * lanes;
            Vector<T>::store(to, v + 1 < V ? total : keep ? total : Vector<T>::load(to));
        }
    }
}

// Segments that one tile of V vectors takes at most.
constexpr int scatter_segments(int64_t vectors) {
    return vectors >= kScatterVectors / 2 ? (vectors == kScatterVectors / 2 ? 2 : 1)
           : vectors == 1                 ? kScatterSegments
                                          : static_cast<int>(kScatterVectors / vectors);
}

template <typename T, int V>
ScatterKernel<T> scatter_tile_of(int64_t segments) {
    if constexpr (scatter_segments(V) > 1) {
        if (segments == 2) return scatter_tile<T, 2, V>;
    }
    if constexpr (scatter_segments(V) > 2) {
        if (segments == 3) return scatter_tile<T, 3, V>;
    }
    if constexpr (scatter_segments(V) > 3) {
        if (segments == 4) return scatter_tile<T, 4, V>;
    }
    if constexpr (scatter_segments(V) > 4) {
        if (segments == 5) return scatter_tile<T, 5, V>;
        if (segments == 6) return scatter_tile<T, 6, V>;
    }
    return scatter_tile<T, 1, V>;
}

// `segments` from 1 to scatter_segments(vectors), `vectors` from 1 to kScatterVectors.
template <typename T>
ScatterKernel<T> scatter_kernel(int64_t segments, int64_t vectors) {
    switch (vectors) {
        case 1:
            return scatter_tile_of<T, 1>(segments);
        case 2:
            return scatter_tile_of<T, 2>(segments);
        case 3:
            return scatter_tile_of<T, 3>(segments);
        case 4:
            return scatter_tile_of<T, 4>(segments);
        case 5:
            return scatter_tile_of<T, 5>(segments);
        case 6:
            return scatter_tile_of<T, 6>(segments);
        case 7:
            return scatter_tile_of<T, 7>(segments);
        case 8:
            return scatter_tile_of<T, 8>(segments);
        case 9:
            return scatter_tile_of<T, 9>(segments);
        case 10:
            return scatter_tile_of<T, 10>(segments);
        case 11:
            return scatter_tile_of<T, 11>(segments);
        default:
            return scatter_tile_of<T, 12>(segments);
    }
}

}  // namespace
}  // namespace pvc
