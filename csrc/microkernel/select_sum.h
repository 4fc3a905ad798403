// The register tile of the weight gradient behind a max-pool for few input channels: B blocks x S shifts x one vector
// of output channels.
//
//     sums[b * S + s][lane] += sum over v < count with codes[v][lane] != kNoVoxel of
//         values[v][lane] * blocks[v * step + offsets[b] + s * shift + lane_of_code[codes[v][lane]]]
//
// A block holds all voxels of a window, shifted by one tap: it is loaded as one vector, and each output channel
// permutes its chosen voxel out of it. Where a vector also holds the window's voxels of the next S - 1 taps along the
// width, they take no further load. One permutation and one FMA per tap serve all lanes.
#pragma once

#include "../isa.h"
#include "../problem.h"

#if (defined(__AVX2__) && PVC_VECTOR_BYTES == 32) || (defined(__AVX512F__) && PVC_VECTOR_BYTES == 64)
#include <immintrin.h>
#endif

namespace pvc {
namespace {

// As many bytes as there are lanes, one per lane. GCC 12 would move them one by one.
template <typename T>
inline typename VectorType<T>::integers widen(const uint8_t* from) {
    using integers = typename VectorType<T>::integers;
#if defined(__AVX2__) && PVC_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) {
        return reinterpret_cast<integers>(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    } else {
        return reinterpret_cast<integers>(_mm256_cvtepu8_epi64(_mm_loadu_si32(from)));
    }
#elif defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        return reinterpret_cast<integers>(
            _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    } else {
        return reinterpret_cast<integers>(
            _mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
#else
    typedef uint8_t bytes __attribute__((vector_size(Vector<T>::lanes)));
    bytes narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    return __builtin_convertvector(narrow, integers);
#endif
}

template <typename T>
struct SelectArguments {
    const T* blocks;
    int64_t step;          // in `blocks`, from one voxel to the next
    const T* values;       // `pitch` from one voxel to the next
    const uint8_t* codes;  // likewise; kNoVoxel, or taken modulo the number of lanes
    int64_t pitch, count;
    const typename VectorType<T>::integer* lane_of_code;  // as many as there are lanes
    int64_t shift;
    T* total;  // to which the values with a voxel are added, or null
};

template <typename V, typename Integers>
inline V permute(V from, Integers lanes) {
#if defined(__clang__)
    constexpr int count = sizeof(V) / sizeof(from[0]);
    V to;
    for (int i = 0; i < count; ++i) to[i] = from[lanes[i] & (count - 1)];
    return to;
#else
    return __builtin_shuffle(from, lanes);
#endif
}

// Keeps the compiler from loading a value again at each use: half of the blocks cross a cache line.
template <typename V>
inline void keep_in_register(V& value) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
    asm("" : "+v"(value));
#else
    static_cast<void>(value);
#endif
}

// The lanes whose code names a voxel. The others are left out, not multiplied by zero: what stands where kNoVoxel would
// point may be infinite, NaN or never written.
template <typename T>
class ChosenLanes {
    using V = Vector<T>;
    using vector = typename V::type;
    using integers = typename VectorType<T>::integers;

  public:
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
    inline explicit ChosenLanes(integers codes) {
        const __m512i all = reinterpret_cast<__m512i>(codes);
        if constexpr (sizeof(T) == 4) {
            mask_ = _mm512_cmpneq_epi32_mask(all, _mm512_set1_epi32(kNoVoxel));
        } else {
            mask_ = _mm512_cmpneq_epi64_mask(all, _mm512_set1_epi64(kNoVoxel));
        }
    }

    inline vector keep(vector value) const {
        if constexpr (sizeof(T) == 4)
            return _mm512_maskz_mov_ps(mask_, value);
        else
            return _mm512_maskz_mov_pd(static_cast<__mmask8>(mask_), value);
    }

    inline vector add(vector sum, vector value, vector voxel) const {
        if constexpr (sizeof(T) == 4)
            return _mm512_mask3_fmadd_ps(value, voxel, sum, mask_);
        else
            return _mm512_mask3_fmadd_pd(value, voxel, sum, static_cast<__mmask8>(mask_));
    }

  private:
    __mmask16 mask_;
#else
    inline explicit ChosenLanes(integers codes) : mask_(codes != kNoVoxel) {}

    inline vector keep(vector value) const {
        return reinterpret_cast<vector>(reinterpret_cast<integers>(value) & mask_);
    }

    inline vector add(vector sum, vector value, vector voxel) const { return sum + value * keep(voxel); }

  private:
    integers mask_;
#endif
};

template <typename T, int B, int S>
void select_tile(const SelectArguments<T>& a, const int32_t* offsets, T* sums) {
    using V = Vector<T>;
    using integers = typename VectorType<T>::integers;
    using integer = typename VectorType<T>::integer;
    typename V::type sum[B][S];
    const T* block[B];
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
        block[b] = a.blocks + offsets[b];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[b][s] = V::load(sums + (b * S + s) * V::lanes);
    }
    integers table;
    std::memcpy(&table, a.lane_of_code, sizeof(table));
    const T* values = a.values;
    const uint8_t* codes = a.codes;
    typename V::type total = {};
    for (int64_t v = 0, place = 0; v < a.count; ++v, values += a.pitch, codes += a.pitch, place += a.step) {
        integers lanes[S];
        const integers chosen = widen<T>(codes);
        lanes[0] = permute(table, chosen);
#pragma GCC unroll 4
        for (int s = 1; s < S; ++s) lanes[s] = lanes[s - 1] + static_cast<integer>(a.shift);
        const ChosenLanes<T> is_chosen(chosen);
        const typename V::type value = is_chosen.keep(V::load(values));
        total += value;
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) {
            typename V::type voxels = V::load(block[b] + place);
            if constexpr (S > 1) keep_in_register(voxels);
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) sum[b][s] = is_chosen.add(sum[b][s], value, permute(voxels, lanes[s]));
        }
    }
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) V::store(sums + (b * S + s) * V::lanes, sum[b][s]);
    }
    if (a.total != nullptr) V::store(a.total, V::load(a.total) + total);
}

// Taps along the width that a tile may take from one block: where there are registers for them.
constexpr int kSelectShifts = kVectorRegisters == 32 ? 3 : 1;

constexpr int64_t select_blocks(int64_t shifts) { return shifts == 1 ? 9 : 7; }

template <typename T>
using SelectKernel = void (*)(const SelectArguments<T>&, const int32_t* offsets, T* sums);

template <typename T, int S, int B>
SelectKernel<T> select_kernel_of(int64_t blocks) {
    if (blocks == B) return select_tile<T, B, S>;
    if constexpr (B > 1) return select_kernel_of<T, S, B - 1>(blocks);
    return nullptr;
}

// `blocks` from 1 to select_blocks(shifts), `shifts` 1 or kSelectShifts.
template <typename T>
SelectKernel<T> select_kernel(int64_t blocks, int64_t shifts) {
    if constexpr (kSelectShifts > 1) {
        if (shifts == kSelectShifts) return select_kernel_of<T, kSelectShifts, select_blocks(kSelectShifts)>(blocks);
    }
    return select_kernel_of<T, 1, select_blocks(1)>(blocks);
}

}  // namespace
}  // namespace pvc
