// The register tile for ordinary channel counts: MR voxels x NR vectors of target channels.
//
// One step of the reduction loads NR vectors of packed weights, broadcasts one source value per voxel and does MR * NR
// FMAs: MR + NR loads for MR * NR FMAs. With MR * NR + NR + 1 vectors the tile stays inside the registers: 6 x 2 and
// 4 x 3 of 16, 8 x 3 of 32 (more voxels would need more pointers than there are general registers). At least
// 2 units * 4 cycles = 8 accumulators are needed to hide the latency of an FMA.
#pragma once

#include "channels_last_tile.h"

namespace pvc {
namespace {

// Length: that of every segment where there are few source channels, so that there is no inner loop to set up; 0 where
// lengths differ. Three taps of one channel share the loads of their places: a third of the loads besides the FMAs.
template <typename T, int MR, int NR, int Length>
void broadcast_tile(const TileArguments<T>& a) {
    using V = Vector<T>;
    typename V::type sum[MR][NR];
    begin_channels_last<T, MR, NR>(a, sum);
    const T* weights = a.weights;
    for (int64_t s = 0; s < a.segment_count; ++s) {
        const T* row[MR];
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) row[m] = a.source + a.items[m] + a.segments[s].offset;
        const auto add = [&](int64_t i) __attribute__((always_inline)) {
            typename V::type weight[NR];
#pragma GCC unroll 4
            for (int n = 0; n < NR; ++n) weight[n] = V::load(weights + n * V::lanes);
            weights += NR * V::lanes;
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
                for (int n = 0; n < NR; ++n) add_product(sum[m][n], weight[n], row[m] + i);
            }
        };
        if constexpr (Length > 0) {
#pragma GCC unroll 3
            for (int i = 0; i < Length; ++i) add(i);
        } else {
            for (int64_t i = 0; i < a.segments[s].length; ++i) add(i);
        }
    }
    end_channels_last<T, MR, NR>(a, sum);
}

// Voxels of a full tile for a block of NR vectors.
constexpr int kBroadcastVectors = 3;

constexpr int broadcast_voxels(int64_t vectors) {
    if (kVectorRegisters == 32 || vectors == 1) return 8;
    return vectors == 2 ? 6 : 4;
}

template <typename T, int NR, int Length>
Microkernel<T> broadcast_tile_of(int64_t voxels) {
    constexpr Microkernel<T> tiles[] = {broadcast_tile<T, 1, NR, Length>, broadcast_tile<T, 2, NR, Length>,
                                        broadcast_tile<T, 3, NR, Length>, broadcast_tile<T, 4, NR, Length>};
    if (voxels <= 4) return tiles[voxels - 1];
    if constexpr (broadcast_voxels(NR) > 4) {
        if (voxels == 5) return broadcast_tile<T, 5, NR, Length>;
        if (voxels == 6) return broadcast_tile<T, 6, NR, Length>;
    }
    if constexpr (broadcast_voxels(NR) > 6) {
        if (voxels == 7) return broadcast_tile<T, 7, NR, Length>;
        if (voxels == 8) return broadcast_tile<T, 8, NR, Length>;
    }
    return nullptr;
}

}  // namespace
}  // namespace pvc
