// The register tile of the ncdhw layout: MR vectors of voxels along the width x NR target channels.
//
// Source channels are planes whose rows are read as (unaligned) vectors, weights are broadcast: MR + NR loads for
// MR * NR FMAs, and neither source nor target is transposed. Nothing depends on the number of channels, which suits
// one channel as well as many. 3 x 4, 4 x 3, 6 x 2 and 8 x 1 fit 16 registers; with 32, MR doubles up to 8.
#pragma once

#include "../isa.h"
#include "segment.h"

namespace pvc {
namespace {

template <typename T, int MR, int NR>
void planar_tile(const TileArguments<T>& a) {
    using V = Vector<T>;
    typename V::type sum[MR][NR];
    const T* row[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
        row[m] = a.source + a.items[m];
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
            if (a.initial != nullptr) {
                sum[m][n] = a.initial[n] - typename V::type{};
            } else {
                sum[m][n] = V::load(a.sums + (m * NR + n) * V::lanes);
            }
        }
    }
    const T* weights = a.weights;
    for (int64_t s = 0; s < a.segment_count; ++s, weights += NR) {
        const int64_t offset = a.segments[s].offset;
        if constexpr (MR < NR) {  // the operand with fewer registers is the one that is kept
            typename V::type value[MR];
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) value[m] = V::load(row[m] + offset);
#pragma GCC unroll 4
            for (int n = 0; n < NR; ++n) {
#pragma GCC unroll 16
                for (int m = 0; m < MR; ++m) sum[m][n] += weights[n] * value[m];
            }
        } else {
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
                const typename V::type value = V::load(row[m] + offset);
#pragma GCC unroll 4
                for (int n = 0; n < NR; ++n) sum[m][n] += weights[n] * value;
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
            T* to =
                a.target != nullptr ? a.target + a.places[m] + n * a.channel_stride : a.sums + (m * NR + n) * V::lanes;
            V::store(to, sum[m][n]);
        }
    }
}

constexpr int kPlanarChannels = 4;

constexpr int planar_vectors(int64_t channels) {
    if (channels == 1) return 8;
    if (kVectorRegisters == 32) return channels == 4 ? 6 : 8;
    return channels == 2 ? 6 : channels == 3 ? 4 : 3;
}

template <typename T, int NR>
Microkernel<T> planar_tile_of(int64_t vectors) {
    constexpr Microkernel<T> tiles[] = {planar_tile<T, 1, NR>, planar_tile<T, 2, NR>, planar_tile<T, 3, NR>};
    if (vectors <= 3) return tiles[vectors - 1];
    if constexpr (planar_vectors(NR) > 3) {
        if (vectors == 4) return planar_tile<T, 4, NR>;
    }
    if constexpr (planar_vectors(NR) > 4) {
        if (vectors == 5) return planar_tile<T, 5, NR>;
        if (vectors == 6) return planar_tile<T, 6, NR>;
    }
    if constexpr (planar_vectors(NR) > 6) {
        if (vectors == 7) return planar_tile<T, 7, NR>;
        if (vectors == 8) return planar_tile<T, 8, NR>;
    }
    return nullptr;
}

}  // namespace
}  // namespace pvc
