// Lists of the gradients that are not zero, one list per output channel, each with the place it points at.
#pragma once

#include "../algorithm/transpose.h"
#include "../isa.h"
#include "select_sum.h"

#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

namespace pvc {
namespace {

// Of a gradient, NaN included; without a branch, which would be mispredicted.
inline bool nonzero(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + bits != 0;
}

inline bool nonzero(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + bits != 0;
}

// What a gradient gives to the voxel that its code names.
template <typename T>
inline T passed(T gradient, uint8_t code) {
    return code == kNoVoxel ? T(0) : gradient;
}

// Pooled voxels: cell i is at grad + at[i] and code + at[i], `channel` from one channel to the next, and its window
// begins at place[i] of the source. code_offsets, of 256 codes, counts from there.
template <typename T>
struct GradientCells {
    const T* grad;
    const uint8_t* code;
    int64_t channel, count;
    const int64_t* at;
    const int32_t* place;
    const int32_t* code_offsets;
};

// The list of channel c begins at c * pitch and has counts[c] entries. A whole vector may be written at its end.
template <typename T>
struct GradientLists {
    T* values;
    int32_t* offsets;
    int32_t* counts;
    int64_t pitch;
};

// Appends the gradients of `channels` channels from `first` on.
template <typename T>
void append_gradients(const GradientCells<T>& cells, int64_t first, int64_t channels, const GradientLists<T>& lists) {
    for (int64_t c = first; c < first + channels; ++c) {
        T* values = lists.values + c * lists.pitch;
        int32_t* offsets = lists.offsets + c * lists.pitch;
        int64_t count = lists.counts[c];
        for (int64_t i = 0; i < cells.count; ++i) {
            const int64_t at = cells.at[i] + c * cells.channel;
            const T gradient = passed(cells.grad[at], cells.code[at]);
            values[count] = gradient;
            offsets[count] = cells.place[i] + cells.code_offsets[cells.code[at]];
            count += nonzero(gradient);
        }
        lists.counts[c] = static_cast<int32_t>(count);
    }
}

// Whether append_lanes may be called, for codes below `codes`.
template <typename T>
bool can_append_lanes(int64_t channel, int64_t codes) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
    return sizeof(T) == 4 && channel == 1 && codes <= Vector<T>::lanes;
#else
    static_cast<void>(channel);
    static_cast<void>(codes);
    return false;
#endif
}

// The same for as many channels as there are lanes, neighbours in memory, and at most as many cells.
template <typename T>
void append_lanes(const GradientCells<T>& cells, int64_t first, const GradientLists<T>& lists) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        constexpr int lanes = Vector<T>::lanes;
        using integers = typename VectorType<T>::integers;
        typename Vector<T>::type values[lanes] = {}, offsets[lanes] = {};
        integers table;
        std::memcpy(&table, cells.code_offsets, sizeof(table));
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i >= cells.count) break;
            const integers codes = widen<T>(cells.code + cells.at[i] + first);
            const integers inside = (codes < lanes) & permute(table, codes);
            values[i] =
                codes == kNoVoxel ? typename Vector<T>::type{} : Vector<T>::load(cells.grad + cells.at[i] + first);
            offsets[i] = reinterpret_cast<typename Vector<T>::type>(inside + cells.place[i]);
        }
        Transpose<T>::registers(values);
        Transpose<T>::registers(offsets);
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
            const auto bits = reinterpret_cast<integers>(values[c]);
            const __mmask16 kept =
                _mm512_test_epi32_mask(reinterpret_cast<__m512i>(bits), _mm512_set1_epi32(INT32_MAX));
            const int64_t end = (first + c) * lists.pitch + lists.counts[first + c];
            _mm512_storeu_ps(lists.values + end, _mm512_maskz_compress_ps(kept, values[c]));
            _mm512_storeu_ps(reinterpret_cast<float*>(lists.offsets + end), _mm512_maskz_compress_ps(kept, offsets[c]));
            lists.counts[first + c] += __builtin_popcount(kept);
        }
    }
#else
    append_gradients(cells, first, Vector<T>::lanes, lists);
#endif
}

}  // namespace
}  // namespace pvc
