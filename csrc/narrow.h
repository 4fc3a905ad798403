// Tensors of 16 bits, float16 and bfloat16: widened to float32 where their values are read, rounded once where results
// are written.
#pragma once

#include "bfloat_pair.h"

namespace pvc {
namespace {

struct __attribute__((may_alias)) Float16 {
    uint16_t bits;
};

// A value of either, where it is only moved.
struct __attribute__((may_alias)) Bits16 {
    uint16_t bits;
};

template <>
struct VectorType<Bits16> {
    typedef uint16_t aligned __attribute__((vector_size(PVC_VECTOR_BYTES)));
    typedef uint16_t unaligned __attribute__((vector_size(PVC_VECTOR_BYTES), aligned(2), may_alias));
};

// As what a tensor of S is moved.
template <typename S>
struct MovedType {
    using type = Bits16;
};
template <>
struct MovedType<float> {
    using type = float;
};
template <typename S>
using Moved = typename MovedType<S>::type;

#if defined(PVC_BFLOAT_PAIRS)

inline void fill_zero(Bits16* to, int64_t count) { std::memset(to, 0, static_cast<size_t>(count) * sizeof(Bits16)); }

inline void copy_values(const Bits16* from, Bits16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 32) {
        const __mmask32 exist = count - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count - i)) - 1;
        _mm512_mask_storeu_epi16(to + i, exist, _mm512_maskz_loadu_epi16(exist, from + i));
    }
}

// The first `count` values (or 16), the rest zero; reads nothing beyond them.
inline Vector<float>::type load_wide(const float* from, int64_t count) {
    if (count >= Vector<float>::lanes) return Vector<float>::load(from);
    return reinterpret_cast<Vector<float>::type>(_mm512_maskz_loadu_ps(first_lanes(count), from));
}

inline Vector<float>::type load_wide(const Bfloat16* from, int64_t count) {
    return reinterpret_cast<Vector<float>::type>(load_bfloat16(from, count) << 16);
}

inline Vector<float>::type load_wide(const Float16* from, int64_t count) {
    return reinterpret_cast<Vector<float>::type>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
}

inline float widen(Float16 value) {
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(value.bits))));
}

inline Float16 to_float16(float value) {
    const __m256i narrow =
        _mm512_cvtps_ph(_mm512_castps128_ps512(_mm_set_ss(value)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return {static_cast<uint16_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(narrow)))};
}

template <typename S>
inline void copy_wide(const S* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        _mm512_mask_storeu_ps(to + i, first_lanes(count - i), reinterpret_cast<__m512>(load_wide(from + i, count - i)));
    }
}

// to[i] = from[i], rounded to the nearest.
inline void copy_narrow(const float* from, float* to, int64_t count) { copy_wide(from, to, count); }

inline void copy_narrow(const float* from, Bfloat16* to, int64_t count) { copy_bfloat16(from, to, count); }

inline void copy_narrow(const float* from, Float16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 exist = first_lanes(count - i);
        _mm256_mask_storeu_epi16(
            to + i, exist,
            _mm512_cvtps_ph(_mm512_maskz_loadu_ps(exist, from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
}

#endif

}  // namespace
}  // namespace pvc
