// A tensor copied from one layout into the other: every sample is a matrix [channels][voxels], transposed.
#pragma once

#include "../parallel.h"
#include "transpose.h"

namespace pvc {
namespace {

// to[sample][c][r] = from[sample][r][c] for r < rows, c < columns.
template <typename T>
void reorder(int64_t samples, int64_t rows, int64_t columns, const T* from, T* to) {
    constexpr int64_t kTask = 16 * 1024;    // elements, which stay in the cache between being read and written
    constexpr int64_t kSerial = 32 * 1024;  // elements that are not worth waking other threads for
    constexpr int64_t kLarge = 16 << 20;    // bytes of a result that is not found in a cache again
    const bool past_caches = samples * rows * columns * static_cast<int64_t>(sizeof(T)) >= kLarge;
    const auto copy_block = past_caches ? transpose_past_caches<T> : transpose<T>;
    // Voxels, the longer side of any but tiny tensors, are shared out.
    const bool by_rows = rows > columns;
    const int64_t shorter = larger(by_rows ? columns : rows, 1), longer = by_rows ? rows : columns;
    constexpr int64_t lanes = Vector<T>::lanes;
    const int64_t step = larger(kTask / shorter / lanes, 1) * lanes, pieces = ceil_divide(longer, step);
    const auto copy = [&](int64_t task) {
        const int64_t sample = task / pieces * rows * columns, first = task % pieces * step;
        const int64_t count = smaller(step, longer - first);
        if (by_rows) {
            copy_block(from + sample + first * columns, columns, to + sample + first, rows, count, columns);
        } else {
            copy_block(from + sample + first, columns, to + sample + first * rows, rows, rows, count);
        }
    };
    if (samples * rows * columns <= kSerial) {
        for (int64_t task = 0; task < samples * pieces; ++task) copy(task);
    } else {
        parallel_for(samples * pieces, copy);
    }
}

}  // namespace
}  // namespace pvc
