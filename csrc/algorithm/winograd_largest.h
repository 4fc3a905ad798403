// The largest output of each 2x2x2 window of a Winograd tile, in registers: the outputs themselves are not stored.
//
// Where nobody asks which voxel it is, the bias is added to a window's largest sum: rounding is monotone, so the result
// is that of adding it to all eight. Else it is added to all, for of equal ones the first is chosen. A sum of all
// outputs, and of the bias, that is not finite says that one of them may not be.
#pragma once

#include "../vector.h"
#include "max_pool.h"
#include "winograd_axis.h"

namespace pvc {
namespace {

// The products of one tile: `point` and `output` are strides in `from`, of plane points and of outputs of the outer
// axis. `exist`: how many outputs per axis lie inside the target, one at least; the outer axis comes first. The windows
// of the tile are written `row` and `column` apart, none less than `least`.
template <typename T>
struct TileLargest {
    const T* from;
    int64_t point, output;
    const T* initial;
    T least;
    int64_t exist[3];
    T* to;
    int64_t row, column;
    uint8_t* codes;  // as `to`, or null: the chosen voxels, `nothing` where a window has none above `least`
    int32_t nothing;
};

// Tiles of two outputs along the outer axis and P x Q in a plane.
template <typename T, int P, int Q, bool Half>
struct WinogradLargest {
    using V = VectorPart<T, Half>;
    using vector = typename V::type;
    static constexpr int PP = WinogradAxis<P>::points, PQ = WinogradAxis<Q>::points;

    static inline vector larger(vector a, vector b) { return a > b ? a : b; }

    typedef typename VectorType<T>::integer integers __attribute__((vector_size(V::bytes)));
    typedef uint8_t bytes __attribute__((vector_size(V::lanes)));

    struct Chosen {
        vector value;
        integers code;

        // `second` where it is larger, `bit` more its code.
        inline void compare(vector second, integers code_of_second, int bit) {
            const integers later = second > value;
            value = later ? second : value;
            code = later ? code_of_second | bit : code;
        }
    };

    // Returns whether an output may be infinite or NaN; what was written then has no meaning.
    static bool run(const TileLargest<T>& a) { return a.codes == nullptr ? run_values(a) : run_codes(a); }

    static bool not_finite(vector sum) {
        sum -= sum;  // zero, or NaN
        uint64_t words[V::bytes / 8], any = 0;
        std::memcpy(words, &sum, sizeof(words));
        for (const uint64_t word : words) any |= word;
        return any != 0;
    }

    static bool run_codes(const TileLargest<T>& a) {
        const vector initial = V::load(a.initial), least = vector{} + a.least;
        vector spoilt = {};
        Chosen best[P / 2 * Q / 2] = {};
        for (int64_t o = 0; o < a.exist[0]; ++o) {
            const T* from = a.from + o * a.output;
            vector v[PP * PQ];
            transform_columns<WinogradAxis<P>, WinogradAxis<Q>, V>(from, a.point, v);
            Chosen row[P][Q / 2];
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                WinogradAxis<Q>::target(v + p * PQ, 1);
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q) {
                    v[p * PQ + q] += initial;
                    spoilt += v[p * PQ + q];
                }
#pragma GCC unroll 2
                for (int q = 0; q < Q; q += 2) {
                    row[p][q / 2] = {v[p * PQ + q], integers{}};
                    if (a.exist[2] > q + 1) row[p][q / 2].compare(v[p * PQ + q + 1], integers{}, 1);
                }
            }
#pragma GCC unroll 2
            for (int p = 0; p < P; p += 2) {
#pragma GCC unroll 2
                for (int q = 0; q < Q / 2; ++q) {
                    Chosen window = row[p][q];
                    if (a.exist[1] > p + 1) window.compare(row[p + 1][q].value, row[p + 1][q].code, 2);
                    Chosen& kept = best[p / 2 * (Q / 2) + q];
                    o == 0 ? void(kept = window) : kept.compare(window.value, window.code, 4);
                }
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < P / 2; ++p) {
#pragma GCC unroll 2
            for (int q = 0; q < Q / 2; ++q) {
                const Chosen& window = best[p * (Q / 2) + q];
                V::store(a.to + p * a.row + q * a.column, larger(window.value, least));
                const integers code = window.value > least ? window.code : integers{} + a.nothing;
                const bytes narrow = LaneBytes<T, V::bytes>::narrow(code);
                std::memcpy(a.codes + p * a.row + q * a.column, &narrow, sizeof(narrow));
            }
        }
        return not_finite(spoilt);
    }

    static bool run_values(const TileLargest<T>& a) {
        const vector initial = V::load(a.initial), least = vector{} + a.least;
        vector spoilt = initial, best[P / 2 * Q / 2] = {};
        for (int64_t o = 0; o < a.exist[0]; ++o) {
            const T* from = a.from + o * a.output;
            vector v[PP * PQ];
            transform_columns<WinogradAxis<P>, WinogradAxis<Q>, V>(from, a.point, v);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                WinogradAxis<Q>::target(v + p * PQ, 1);
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q) spoilt += v[p * PQ + q];
#pragma GCC unroll 2
                for (int q = 0; q < Q; q += 2) {
                    vector& larger_of_row = v[p * PQ + q / 2];
                    larger_of_row = a.exist[2] > q + 1 ? larger(v[p * PQ + q], v[p * PQ + q + 1]) : v[p * PQ + q];
                }
            }
#pragma GCC unroll 2
            for (int p = 0; p < P; p += 2) {
#pragma GCC unroll 2
                for (int q = 0; q < Q / 2; ++q) {
                    const vector first = v[p * PQ + q];
                    const vector window = a.exist[1] > p + 1 ? larger(first, v[(p + 1) * PQ + q]) : first;
                    vector& kept = best[p / 2 * (Q / 2) + q];
                    kept = o == 0 ? window : larger(kept, window);
                }
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < P / 2; ++p) {
#pragma GCC unroll 2
            for (int q = 0; q < Q / 2; ++q) {
                V::store(a.to + p * a.row + q * a.column, larger(best[p * (Q / 2) + q] + initial, least));
            }
        }
        return not_finite(spoilt);
    }
};

}  // namespace
}  // namespace pvc
