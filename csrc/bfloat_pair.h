// bfloat16, and the pairs of them that a dot product takes: vdpbf16ps adds the products of two pairs to a float32 sum,
// the second product first, each rounded to nearest as an FMA rounds; numbers below the smallest normal one, in
// operands, sums and results, count as zero.
#pragma once

#include "vector.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && PVC_VECTOR_BYTES == 64
#define PVC_BFLOAT_PAIRS 1
#include <immintrin.h>
#endif

namespace pvc {
namespace {

// The upper half of a float32.
struct __attribute__((may_alias)) Bfloat16 {
    uint16_t bits;
};

struct __attribute__((may_alias)) BfloatPair {
    Bfloat16 first, second;
};

// A vector of pairs travels through registers of floats.
template <>
struct VectorType<BfloatPair> : VectorType<float> {};

// In what products of T are summed.
template <typename T>
struct SumType {
    using type = T;
};
template <>
struct SumType<BfloatPair> {
    using type = float;
};
template <typename T>
using Sum = typename SumType<T>::type;

template <typename T>
constexpr bool is_pair = false;
template <>
constexpr bool is_pair<BfloatPair> = true;

// sum + weight * *value, lane by lane.
template <typename T>
inline void add_product(typename Vector<T>::type& sum, typename Vector<T>::type weight, const T* value) {
    sum += *value * weight;
}

inline float widen(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

inline float widen(float value) { return value; }

// To the nearest, ties to even; a NaN stays one.
inline Bfloat16 to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return {static_cast<uint16_t>(value != value ? bits >> 16 | 0x40 : rounded >> 16)};
}

inline Bfloat16 to_bfloat16(Bfloat16 value) { return value; }

#if defined(PVC_BFLOAT_PAIRS)
template <>
inline void add_product<BfloatPair>(Vector<BfloatPair>::type& sum, Vector<BfloatPair>::type weight,
                                    const BfloatPair* value) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(*value));
}

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }

typedef uint32_t Words __attribute__((vector_size(64)));

// The first `count` values (or 16) as bfloat16 in the lower half of each lane, the rest zero.
inline Words load_bfloat16(const Bfloat16* from, int64_t count) {
    return reinterpret_cast<Words>(
        _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(first_lanes(count), from)));
}

inline Words load_bfloat16(const float* from, int64_t count) {
    const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count), from);
    const Words bits = reinterpret_cast<Words>(value), upper = bits >> 16;
    const Words rounded = (bits + 0x7fff + (upper & 1)) >> 16;
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return reinterpret_cast<Words>(
        _mm512_mask_blend_epi32(nan, reinterpret_cast<__m512i>(rounded), reinterpret_cast<__m512i>(upper | 0x40)));
}

// to[i] = from[i], rounded.
template <typename S>
inline void copy_bfloat16(const S* from, Bfloat16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        _mm512_mask_cvtepi32_storeu_epi16(to + i, first_lanes(count - i),
                                          reinterpret_cast<__m512i>(load_bfloat16(from + i, count - i)));
    }
}

// to[i] = {first[i], second[i]}, rounded; `second` may be null.
template <typename S>
inline void copy_pairs(const S* first, const S* second, BfloatPair* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        Words pairs = load_bfloat16(first + i, count - i);
        if (second != nullptr) pairs |= load_bfloat16(second + i, count - i) << 16;
        _mm512_mask_storeu_epi32(to + i, first_lanes(count - i), reinterpret_cast<__m512i>(pairs));
    }
}
#endif

}  // namespace
}  // namespace pvc
