// The register tile of depthwise convolution: MR voxels x NR vectors of channels, each channel with its own weights.
//
// Every segment is one tap. Source values are loaded as whole vectors of channels, so a step does MR * NR FMAs for
// MR * NR + NR loads: bound by the two loads per cycle, close to one FMA per cycle and unit.
#pragma once

#include "../isa.h"
#include "segment.h"

namespace pvc {
namespace {

template <typename T, int MR, int NR>
void depthwise_tile(const T* source, const int32_t* voxels, const Segment* segments, int64_t segment_count,
                    const T* weights, const T* initial, T* accumulators) {
    using V = Vector<T>;
    typename V::type sum[MR][NR];
    const T* row[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
        row[m] = source + voxels[m];
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
            sum[m][n] = V::load((initial != nullptr ? initial : accumulators + m * NR * V::lanes) + n * V::lanes);
        }
    }
    for (int64_t s = 0; s < segment_count; ++s, weights += NR * V::lanes) {
        const int64_t offset = segments[s].offset;
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
            const typename V::type weight = V::load(weights + n * V::lanes);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) sum[m][n] += V::load(row[m] + offset + n * V::lanes) * weight;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) V::store(accumulators + (m * NR + n) * V::lanes, sum[m][n]);
    }
}

constexpr int kDepthwiseVoxels = 4;

template <typename T, int NR>
Microkernel<T> depthwise_tile_of(int64_t voxels) {
    switch (voxels) {
        case 1:
            return depthwise_tile<T, 1, NR>;
        case 2:
            return depthwise_tile<T, 2, NR>;
        case 3:
            return depthwise_tile<T, 3, NR>;
        case 4:
            return depthwise_tile<T, 4, NR>;
    }
    return nullptr;
}

}  // namespace
}  // namespace pvc
