// The accumulators of channels-last kernels: MR voxels x NR vectors of target channels, from and to memory.
#pragma once

#include "../isa.h"
#include "segment.h"

namespace pvc {
namespace {

template <typename T, int MR, int NR>
inline void begin_channels_last(const TileArguments<T>& a, typename Vector<T>::type (&sum)[MR][NR]) {
    using V = Vector<Sum<T>>;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
        const Sum<T>* from = a.initial != nullptr ? a.initial : a.sums + m * NR * V::lanes;
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) sum[m][n] = V::load(from + n * V::lanes);
    }
}

template <typename T, int MR, int NR>
inline void end_channels_last(const TileArguments<T>& a, const typename Vector<T>::type (&sum)[MR][NR]) {
    using V = Vector<Sum<T>>;
    if (a.stream) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < NR; ++n) V::stream(a.target + a.places[m] + n * V::lanes, sum[m][n]);
        }
        return;
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
        Sum<T>* to = a.target != nullptr ? a.target + a.places[m] : a.sums + m * NR * V::lanes;
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) V::store(to + n * V::lanes, sum[m][n]);
    }
}

}  // namespace
}  // namespace pvc
