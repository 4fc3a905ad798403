// Sums over channels and rows of a planar source, times few columns of weights each: lanes are neighbouring voxels of a
// row, so that no lane is idle however few columns there are.
//
//     sums[column][voxel] = sum over rows r, channels c of  r.values[c][voxel] * r.weights[c][column]
#pragma once

#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct SourceRow {
    const T* values;   // [channel][voxel]
    const T* weights;  // [channel][column]
};

template <typename T>
struct RowProducts {
    const SourceRow<T>* rows;
    int64_t count, channels;
    int64_t row_pitch;  // between channels of a row, in values; whole vectors
    T* sums;            // columns are a row_pitch apart
};

constexpr int kMostColumns = kVectorRegisters == 32 ? 14 : 12;

// Vectors of a row that are summed together: as the registers allow, and no more than keep the arithmetic busy.
constexpr int most_vectors(int columns) {
    const int fitting = (kVectorRegisters - 2) / (columns + 1);
    return fitting < 4 ? fitting : 4;
}

template <typename T, int Columns, int Vectors>
void row_products(const RowProducts<T>& p, int64_t first) {
    using V = Vector<T>;
    typename V::type sums[Columns][Vectors] = {};
    for (int64_t r = 0; r < p.count; ++r) {
        const T *from = p.rows[r].values + first, *weights = p.rows[r].weights;
        for (int64_t c = 0; c < p.channels; ++c, from += p.row_pitch, weights += Columns) {
            typename V::type values[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) values[v] = V::load(from + v * V::lanes);
#pragma GCC unroll 16
            for (int k = 0; k < Columns; ++k) {
                if constexpr (Vectors == 1) {
                    sums[k][0] = V::multiply_add(values[0], weights + k, sums[k][0]);
                } else {
                    const typename V::type weight = V::broadcast(weights + k);
#pragma GCC unroll 4
                    for (int v = 0; v < Vectors; ++v) sums[k][v] += weight * values[v];
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int k = 0; k < Columns; ++k) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) V::store(p.sums + k * p.row_pitch + first + v * V::lanes, sums[k][v]);
    }
}

// `columns` is from Columns to kMostColumns.
template <typename T, int Columns = 1>
void sum_rows(int64_t columns, const RowProducts<T>& p) {
    if constexpr (Columns < kMostColumns) {
        if (columns > Columns) return sum_rows<T, Columns + 1>(columns, p);
    }
    constexpr int most = most_vectors(Columns);
    const int64_t step = most * Vector<T>::lanes;
    int64_t first = 0;
    for (; first + step <= p.row_pitch; first += step) row_products<T, Columns, most>(p, first);
    const int64_t left = (p.row_pitch - first) / Vector<T>::lanes;
    if constexpr (most > 3) {
        if (left == 3) row_products<T, Columns, 3>(p, first);
    }
    if constexpr (most > 2) {
        if (left == 2) row_products<T, Columns, 2>(p, first);
    }
    if constexpr (most > 1) {
        if (left == 1) row_products<T, Columns, 1>(p, first);
    }
}

}  // namespace
}  // namespace pvc
