// The register tile of depthwise convolution: MR voxels x NR vectors of channels, each channel with its own weights.
//
// Every segment is one tap. Source values are loaded as whole vectors of channels, so a step does MR * NR FMAs for
// MR * NR + NR loads: bound by the two loads per cycle, close to one FMA per cycle and unit.
#pragma once

#include "channels_last_tile.h"

namespace pvc {
namespace {

template <typename T, int MR, int NR>
void depthwise_tile(const TileArguments<T>& a) {
    using V = Vector<T>;
    typename V::type sum[MR][NR];
    begin_channels_last<T, MR, NR>(a, sum);
    const T* row[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) row[m] = a.source + a.items[m];
    const T* weights = a.weights;
    for (int64_t s = 0; s < a.segment_count; ++s, weights += NR * V::lanes) {
        const int64_t offset = a.segments[s].offset;
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
            const typename V::type weight = V::load(weights + n * V::lanes);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) sum[m][n] += V::load(row[m] + offset + n * V::lanes) * weight;
        }
    }
    end_channels_last<T, MR, NR>(a, sum);
}

constexpr int kDepthwiseVoxels = 4;
constexpr int kDepthwiseVectors = 3;

template <typename T, int NR>
Microkernel<T> depthwise_tile_of(int64_t voxels) {
    constexpr Microkernel<T> tiles[] = {depthwise_tile<T, 1, NR>, depthwise_tile<T, 2, NR>, depthwise_tile<T, 3, NR>,
                                        depthwise_tile<T, 4, NR>};
    return tiles[voxels - 1];
}

}  // namespace
}  // namespace pvc
