// Transposition of a matrix between two layouts, in blocks of lanes x lanes values that stay in registers.
//
// A block is transposed in two levels, because instruction sets shuffle cheaply inside 128-bit parts and whole parts:
// first every 128-bit part for itself (interleave pairs, then pairs of pairs), then the parts among the registers.
#pragma once

#include "../narrow.h"
#include "gather.h"

namespace pvc {
namespace {

// Every second lane of two vectors, for Transpose::pick.
struct EvenLanes {
    static constexpr int lane(int i) { return 2 * i; }
};
struct OddLanes {
    static constexpr int lane(int i) { return 2 * i + 1; }
};

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

    // rows[i] of 4 registers (float): afterwards the registers one after another hold rows[0][0], rows[1][0],
    // rows[2][0], rows[3][0], rows[0][1] and so on.
    static inline void interleave_four(type* rows) {
        inside_parts(rows);
        if constexpr (parts > 1) {
            const type a = pick<Exchange<1, false>>(rows[0], rows[1]), b = pick<Exchange<1, false>>(rows[2], rows[3]);
            const type c = pick<Exchange<1, true>>(rows[0], rows[1]), d = pick<Exchange<1, true>>(rows[2], rows[3]);
            rows[0] = a, rows[1] = b, rows[2] = c, rows[3] = d;
            if constexpr (parts > 2) {
                rows[0] = pick<Exchange<2, false>>(a, b);
                rows[1] = pick<Exchange<2, false>>(c, d);
                rows[2] = pick<Exchange<2, true>>(a, b);
                rows[3] = pick<Exchange<2, true>>(c, d);
            }
        }
    }

    static inline void registers(type* rows) {
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) inside_parts(rows + p * part);
        among_parts<1>(rows);
    }

    template <bool Stream = false>
    static inline void block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
        type rows[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = V::load(from + i * from_stride);
        registers(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if constexpr (Stream) {
                V::stream(to + i * to_stride, rows[i]);
            } else {
                V::store(to + i * to_stride, rows[i]);
            }
        }
    }
};

// The same for small lanes, in blocks of as many rows as 128 bits hold lanes: each round doubles the runs that lie
// right.
template <typename Lane>
struct PartTranspose {
    typedef Lane type __attribute__((vector_size(16), aligned(sizeof(Lane)), may_alias));
    static constexpr int lanes = 16 / static_cast<int>(sizeof(Lane));
    using Indices = typename Transpose<float>::Count<lanes>::type;

    template <bool High, int... I>
    static inline type interleave(type a, type b, Transpose<float>::Indices<I...>) {
        return __builtin_shufflevector(a, b, (I % 2 * lanes + I / 2 + (High ? lanes / 2 : 0))...);
    }

    static inline void block(const Lane* from, int64_t from_stride, Lane* to, int64_t to_stride) {
        type rows[lanes], next[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = *reinterpret_cast<const type*>(from + i * from_stride);
#pragma GCC unroll 4
        for (int run = 1; run < lanes; run *= 2) {
#pragma GCC unroll 8
            for (int i = 0; i < lanes / 2; ++i) {
                next[2 * i] = interleave<false>(rows[i], rows[i + lanes / 2], Indices{});
                next[2 * i + 1] = interleave<true>(rows[i], rows[i + lanes / 2], Indices{});
            }
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) rows[i] = next[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) *reinterpret_cast<type*>(to + i * to_stride) = rows[i];
    }
};

inline void transpose_block(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    PartTranspose<uint8_t>::block(from, from_stride, to, to_stride);
}

inline void transpose_block(const Bits16* from, int64_t from_stride, Bits16* to, int64_t to_stride) {
    PartTranspose<uint16_t>::block(&from->bits, from_stride, &to->bits, to_stride);
}

template <typename T>
constexpr int64_t transpose_lanes = Vector<T>::lanes;
template <>
constexpr int64_t transpose_lanes<uint8_t> = PartTranspose<uint8_t>::lanes;
template <>
constexpr int64_t transpose_lanes<Bits16> = PartTranspose<uint16_t>::lanes;

template <typename T>
inline void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    Transpose<T>::block(from, from_stride, to, to_stride);
}

// to[c][r] = from[r][c] for r < rows, c < columns; T is float, double, uint8_t or Bits16. `from` and `to` do not
// overlap.
//
// The side whose lines are further apart (planes of a tensor, often a power of two apart, so that their lines compete
// for the same cache sets) is walked along its lines, lanes of them at a time. A size that is no multiple of the lanes
// ends with an overlapping block.
template <typename T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
    constexpr int64_t lanes = transpose_lanes<T>;
    if (rows < lanes || columns < lanes) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
        }
        return;
    }
    const auto block = [&](int64_t r, int64_t c) {
        r = smaller(r, rows - lanes);
        c = smaller(c, columns - lanes);
        transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
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

// The same for a result that is too large to be found in a cache again: written past them where that is by whole lines.
template <typename T>
void transpose_past_caches(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
                           int64_t columns) {
    constexpr int64_t lanes = Vector<T>::lanes, kLine = 64;
    const bool whole = PVC_VECTOR_BYTES == kLine && rows % lanes == 0 && columns % lanes == 0 &&
                       to_stride % lanes == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
    if (!kStreams || !whole) {
        transpose(from, from_stride, to, to_stride, rows, columns);
        return;
    }
    const bool by_rows = from_stride > to_stride;
    const int64_t outer = by_rows ? rows : columns, inner = by_rows ? columns : rows;
    for (int64_t i = 0; i < outer; i += lanes) {
        for (int64_t j = 0; j < inner; j += lanes) {
            const int64_t r = by_rows ? i : j, c = by_rows ? j : i;
            Transpose<T>::template block<true>(from + r * from_stride + c, from_stride, to + c * to_stride + r,
                                               to_stride);
        }
    }
    Vector<T>::finish_stream();
}

}  // namespace
}  // namespace pvc
