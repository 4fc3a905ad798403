// The register tile of the weight gradient behind a max-pool for few input channels: C columns x one vector of output
// channels.
//
//     sums[c][lane] += sum over v < count of  values[v][lane] * blocks[places[v] + columns[c] + choices[v][lane]]
//
// A block holds all voxels of a window, shifted by one tap: it is loaded as one vector, and each output channel
// permutes its chosen voxel out of it. One load, one permutation and one FMA serve all lanes, whatever the number of
// taps.
#pragma once

#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct SelectArguments {
    const T* blocks;
    const int32_t* places;
    const T* values;                                 // `pitch` from one voxel to the next
    const typename VectorType<T>::integer* choices;  // likewise; taken modulo the number of lanes
    int64_t pitch, count;
};

template <typename T>
inline typename Vector<T>::type permute(typename Vector<T>::type from, typename VectorType<T>::integers lanes) {
#if defined(__clang__)
    typename Vector<T>::type to;
    for (int i = 0; i < Vector<T>::lanes; ++i) to[i] = from[lanes[i] & (Vector<T>::lanes - 1)];
    return to;
#else
    return __builtin_shuffle(from, lanes);
#endif
}

template <typename T, int C>
void select_tile(const SelectArguments<T>& a, const int32_t* columns, T* sums) {
    using V = Vector<T>;
    using integers = typename VectorType<T>::integers;
    typename V::type sum[C];
    int64_t column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
        sum[c] = V::load(sums + c * V::lanes);
        column[c] = columns[c];
    }
    const T* values = a.values;
    const auto* choices = a.choices;
    for (int64_t v = 0; v < a.count; ++v, values += a.pitch, choices += a.pitch) {
        integers lanes;
        std::memcpy(&lanes, choices, sizeof(lanes));
        const typename V::type value = V::load(values);
        const T* block = a.blocks + a.places[v];
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[c] += value * permute<T>(V::load(block + column[c]), lanes);
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) V::store(sums + c * V::lanes, sum[c]);
}

constexpr int kSelectColumns = 9;

template <typename T>
using SelectKernel = void (*)(const SelectArguments<T>&, const int32_t* columns, T* sums);

// `columns` from 1 to kSelectColumns.
template <typename T>
SelectKernel<T> select_kernel(int64_t columns) {
    constexpr SelectKernel<T> kernels[] = {select_tile<T, 1>, select_tile<T, 2>, select_tile<T, 3>,
                                           select_tile<T, 4>, select_tile<T, 5>, select_tile<T, 6>,
                                           select_tile<T, 7>, select_tile<T, 8>, select_tile<T, 9>};
    return kernels[columns - 1];
}

}  // namespace
}  // namespace pvc
