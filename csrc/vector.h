// One explicit vector type for every instruction set, from the compiler's vector extension.
//
// `Vector<T>::type` is a GCC/Clang vector of PVC_VECTOR_BYTES bytes. Arithmetic is written with plain operators, a
// scalar operand is broadcast, and `acc += scalar * vector` becomes one FMA where the instruction set has one
// (-ffp-contract=fast). The width follows the flags of the translation unit; -DPVC_VECTOR_BYTES=64 overrides it, so
// that the 16-lane shapes can be built and tested with AVX2 flags (the compiler then uses two registers per vector).
#pragma once

#include <cstdint>
#include <cstring>

#ifndef PVC_VECTOR_BYTES
#if defined(__AVX512F__)
#define PVC_VECTOR_BYTES 64
#elif defined(__AVX__)
#define PVC_VECTOR_BYTES 32
#else
#define PVC_VECTOR_BYTES 16
#endif
#endif

namespace pvc {
namespace {

template <typename T>
struct VectorType;

template <>
struct VectorType<float> {
    typedef float aligned __attribute__((vector_size(PVC_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(PVC_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t integer;                                                  // of the same size
    typedef integer integers __attribute__((vector_size(PVC_VECTOR_BYTES)));  // what a comparison gives
};

template <>
struct VectorType<double> {
    typedef double aligned __attribute__((vector_size(PVC_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(PVC_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t integer;
    typedef integer integers __attribute__((vector_size(PVC_VECTOR_BYTES)));
};

// Whether Vector::stream writes past the caches.
#if defined(__AVX__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif

// T is float or double. No pointer needs to be aligned beyond T.
template <typename T>
struct Vector {
    using type = typename VectorType<T>::aligned;
    static constexpr int lanes = PVC_VECTOR_BYTES / static_cast<int>(sizeof(T));

    static inline type load(const T* from) { return *reinterpret_cast<const typename VectorType<T>::unaligned*>(from); }

    static inline void store(T* to, type value) { *reinterpret_cast<typename VectorType<T>::unaligned*>(to) = value; }

    // Like store, but past the caches where the processor can: no line is read before it is overwritten. For results
    // too large to be found in a cache again. `to` is aligned to the vector; `finish_stream` comes before others may
    // read.
    static inline void stream(T* to, type value) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
        asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<type*>(to)) : "v"(value));
#elif defined(__AVX__) && PVC_VECTOR_BYTES == 32
        asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<type*>(to)) : "x"(value));
#else
        store(to, value);
#endif
    }

    static inline void finish_stream() {
#if defined(__AVX__)
        asm volatile("sfence" : : : "memory");
#endif
    }

    // a * *scalar, and sum + a * *scalar in one instruction where there is one. With AVX-512 the scalar is an embedded
    // broadcast: GCC 12 writes a load of its own, which takes a slot of the arithmetic pipes.
    static inline type multiply(type a, const T* scalar) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
        type product;
        if constexpr (sizeof(T) == 4) {
            asm("vmulps %2%{1to16%}, %1, %0" : "=v"(product) : "v"(a), "m"(*scalar));
        } else {
            asm("vmulpd %2%{1to8%}, %1, %0" : "=v"(product) : "v"(a), "m"(*scalar));
        }
        return product;
#else
        return a * *scalar;
#endif
    }

    // The scalar in all lanes of a register. With AVX-512, GCC 12 would fold the load into each FMA that uses it.
    static inline type broadcast(const T* scalar) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
        type value;
        if constexpr (sizeof(T) == 4) {
            asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*scalar));
        } else {
            asm("vbroadcastsd %1, %0" : "=v"(value) : "m"(*scalar));
        }
        return value;
#else
        return *scalar - type{};  // not plus: that is not the identity for -0
#endif
    }

    // Two scalars in all pairs of neighbouring lanes.
    static inline type broadcast_pair(const T* scalars) {
        type value;
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
        if constexpr (sizeof(T) == 4) {
            asm("vbroadcastsd %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const T(*)[2]>(scalars)));
        } else {
            asm("vbroadcastf64x2 %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const T(*)[2]>(scalars)));
        }
#else
        for (int i = 0; i < lanes; ++i) value[i] = scalars[i % 2];
#endif
        return value;
    }

    static inline type multiply_add(type a, const T* scalar, type sum) {
#if defined(__AVX512F__) && PVC_VECTOR_BYTES == 64
        if constexpr (sizeof(T) == 4) {
            asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*scalar));
        } else {
            asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*scalar));
        }
        return sum;
#else
        return sum + a * *scalar;
#endif
    }

    // The first `count` (0 to lanes) elements, the rest zero; reads nothing beyond them.
    static inline type load_partial(const T* from, int64_t count) {
        type value = {};
        std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(T));
        return value;
    }

    // Writes the first `count` (0 to lanes) elements and nothing beyond them.
    static inline void store_partial(T* to, type value, int64_t count) {
        std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(T));
    }
};

// Half of a vector where vectors have 64 bytes, for what does not fill a whole one.
constexpr bool kHalfVectors = PVC_VECTOR_BYTES == 64;

template <typename T, bool Half>
struct VectorPart {
    static constexpr int bytes = PVC_VECTOR_BYTES / (Half ? 2 : 1), lanes = bytes / static_cast<int>(sizeof(T));
    typedef T type __attribute__((vector_size(bytes)));
    typedef T unaligned __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));

    static inline type load(const T* from) { return *reinterpret_cast<const unaligned*>(from); }

    static inline void store(T* to, type value) { *reinterpret_cast<unaligned*>(to) = value; }

    // The first lanes of a whole vector.
    static inline type first(typename VectorType<T>::aligned value) {
        type part;
        std::memcpy(&part, &value, sizeof(part));
        return part;
    }

    // The lanes' bits that `mask` has.
    static inline type keep(type value, typename VectorType<T>::integer mask) {
        typedef typename VectorType<T>::integer integers __attribute__((vector_size(bytes)));
        return reinterpret_cast<type>(reinterpret_cast<integers>(value) & mask);
    }
};

}  // namespace
}  // namespace pvc
