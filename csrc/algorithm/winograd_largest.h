// The largest output of each 2x2x2 window of a Winograd tile, in registers: the outputs themselves are not stored.
//
// For pooled values whose voxels nobody asks for. The bias is added to a window's largest sum: rounding is monotone, so
// the result is that of adding it to all eight. A sum of all outputs and the bias that is not finite says that one of
// them may not be.
#pragma once

#include "../vector.h"
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
};

// Tiles of two outputs along the outer axis and P x Q in a plane.
template <typename T, int P, int Q, bool Half>
struct WinogradLargest {
    using V = VectorPart<T, Half>;
    using vector = typename V::type;
    static constexpr int PP = WinogradAxis<P>::points, PQ = WinogradAxis<Q>::points;

    static inline vector larger(vector a, vector b) { return a > b ? a : b; }

    // Returns whether an output may be infinite or NaN; what was written then has no meaning.
    static bool run(const TileLargest<T>& a) {
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
        spoilt -= spoilt;  // zero, or NaN
        uint64_t words[V::bytes / 8], any = 0;
        std::memcpy(words, &spoilt, sizeof(words));
        for (const uint64_t word : words) any |= word;
        return any != 0;
    }
};

}  // namespace
}  // namespace pvc
