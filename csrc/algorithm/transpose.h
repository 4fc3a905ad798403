// Transposition of a matrix between two layouts, in blocks of lanes x lanes values that stay in registers.
//
// A block is transposed in two levels, because instruction sets shuffle cheaply inside 128-bit parts and whole parts:
// first every 128-bit part for itself (interleave pairs, then pairs of pairs), then the parts among the registers.
#pragma once

#include "../vector.h"
#include "gather.h"

namespace pvc {
namespace {

template <typename T>
struct Transpose {
    using V = Vector<T>;
    using type = typename V::type;
    static constexpr int lanes = V::lanes;
    static constexpr int part = 16 / static_cast<int>(sizeof(T));  // lanes in 128 bits
    static constexpr int parts = lanes / part;

    template <int... I>
    struct Indices {};
    template <int N, int... I>
    struct Count : Count<N - 1, N - 1, I...> {};
    template <int... I>
    struct Count<0, I...> {
        using type = Indices<I...>;
    };

    template <typename Pick, int... I>
    static inline type shuffle(type a, type b, Indices<I...>) {
        return __builtin_shufflevector(a, b, Pick::lane(I)...);
    }

    // Lane i of the result, for a and b numbered 0 .. 2 * lanes - 1.
    template <int Run, bool High>  // interleave runs of `Run` lanes from the low or high half of each 128-bit part
    struct Interleave {
        static constexpr int lane(int i) {
            const int inside = i % part, run = inside / Run;
            return (run % 2) * lanes + i / part * part + (High ? part / 2 : 0) + run / 2 * Run + inside % Run;
        }
    };
    template <int Distance, bool High>  // 2 x 2 transposition of blocks of `Distance` 128-bit parts
    struct Exchange {
        static constexpr int lane(int i) {
            const int p = i / part, odd = p / Distance % 2, base = p - odd * Distance;
            return odd * lanes + (base + (High ? Distance : 0)) * part + i % part;
        }
    };

    typedef T Part __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
    using PartIndices = typename Count<parts>::type;

    template <int P, int... I>
    static inline Part part_of(type value, Indices<I...>) {
        return __builtin_shufflevector(value, value, (P * part + I)...);
    }

    template <int... P>
    static inline void store_each(type value, T* to, int64_t stride, Indices<P...>) {
        ((*reinterpret_cast<Part*>(to + P * stride) = part_of<P>(value, typename Count<part>::type{})), ...);
    }

    template <typename Pick>
    static inline type pick(type a, type b) {
        return shuffle<Pick>(a, b, typename Count<lanes>::type{});
    }

    // rows[i] of 4 (float) or 2 (double) registers: transposes each 128-bit part.
    static inline void inside_parts(type* rows) {
        if constexpr (part == 4) {
            const type a = pick<Interleave<1, false>>(rows[0], rows[1]),
                       b = pick<Interleave<1, true>>(rows[0], rows[1]);
            const type c = pick<Interleave<1, false>>(rows[2], rows[3]),
                       d = pick<Interleave<1, true>>(rows[2], rows[3]);
            rows[0] = pick<Interleave<2, false>>(a, c);
            rows[1] = pick<Interleave<2, true>>(a, c);
            rows[2] = pick<Interleave<2, false>>(b, d);
            rows[3] = pick<Interleave<2, true>>(b, d);
        } else {
            const type a = rows[0], b = rows[1];
            rows[0] = pick<Interleave<1, false>>(a, b);
            rows[1] = pick<Interleave<1, true>>(a, b);
        }
    }

    template <int Distance>
    static inline void among_parts(type* rows) {
        if constexpr (Distance < parts) {
#pragma GCC unroll 16
            for (int p = 0; p < parts; ++p) {
                if (p / Distance % 2 != 0) continue;
#pragma GCC unroll 4
                for (int i = 0; i < part; ++i) {
                    type& low = rows[p * part + i];
                    type& high = rows[(p + Distance) * part + i];
                    const type a = low, b = high;
                    low = pick<Exchange<Distance, false>>(a, b);
                    high = pick<Exchange<Distance, true>>(a, b);
                }
            }
            among_parts<Distance * 2>(rows);
        }
    }

    // Writes each 128-bit part of a register, `stride` elements apart.
    static inline void store_parts(type value, T* to, int64_t stride) { store_each(value, to, stride, PartIndices{}); }

    static inline void block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
        type rows[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = V::load(from + i * from_stride);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) inside_parts(rows + p * part);
        among_parts<1>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) V::store(to + i * to_stride, rows[i]);
    }
};

// to[c][r] = from[r][c] for r < rows, c < columns. `from` and `to` do not overlap.
//
// The side whose lines are further apart (planes of a tensor, often a power of two apart, so that their lines compete
// for the same cache sets) is walked along its lines, lanes of them at a time. A size that is no multiple of the lanes
// ends with an overlapping block.
template <typename T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
    constexpr int64_t lanes = Vector<T>::lanes;
    if (rows < lanes || columns < lanes) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
        }
        return;
    }
    const auto block = [&](int64_t r, int64_t c) {
        r = smaller(r, rows - lanes);
        c = smaller(c, columns - lanes);
        Transpose<T>::block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    };
    if (from_stride > to_stride) {
        for (int64_t r = 0; r < rows; r += lanes) {
            for (int64_t c = 0; c < columns; c += lanes) block(r, c);
        }
    } else {
        for (int64_t c = 0; c < columns; c += lanes) {
            for (int64_t r = 0; r < rows; r += lanes) block(r, c);
        }
    }
}

}  // namespace
}  // namespace pvc
