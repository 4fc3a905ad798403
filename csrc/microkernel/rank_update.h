// A small matrix product with a register tile: sums[row][column] += sum over k of x[k][row] * y[k][column].
//
// The tile is R rows, each a broadcast value of x, by NR vectors of columns. As for panel.h, k are the tiles of a box;
// here they are what is summed over.
#pragma once

#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct RankUpdate {
    const T* x;        // [k][row]
    const T* y;        // [vector of columns][k][lane]
    int64_t step;      // between k, in both
    int64_t y_vector;  // between vectors of columns
    int64_t count;     // of k
    T* sums;
    int64_t pitch;  // between rows
};

template <typename T, int R, int NR>
void rank_update(const RankUpdate<T>& a) {
    using V = Vector<T>;
    typename V::type sum[R][NR];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) sum[r][n] = V::load(a.sums + r * a.pitch + n * V::lanes);
    }
    const T* x = a.x;
    const T* y = a.y;
    for (int64_t k = 0; k < a.count; ++k, x += a.step, y += a.step) {
        typename V::type columns[NR];
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) columns[n] = V::load(y + n * a.y_vector);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const T value = x[r];
#pragma GCC unroll 4
            for (int n = 0; n < NR; ++n) sum[r][n] += value * columns[n];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) V::store(a.sums + r * a.pitch + n * V::lanes, sum[r][n]);
    }
}

constexpr int kRankUpdateVectors = kVectorRegisters == 32 ? 3 : 2;

// Rows of a tile of NR vectors; they divide a vector.
template <typename T>
constexpr int rank_update_rows(int vectors) {
    const int most = (kVectorRegisters == 32 ? 8 : 4) * (vectors == 1 ? 2 : 1);
    return Vector<T>::lanes < most ? Vector<T>::lanes : most;
}

}  // namespace
}  // namespace pvc
