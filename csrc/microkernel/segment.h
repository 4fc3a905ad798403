// How a microkernel walks its reduction.
//
// A tile of the source lies channels-last in scratch memory. The products of one target voxel are then a list of
// segments: runs of consecutive source values, `offset` away from the voxel's own position, that meet consecutive rows
// of packed weights.
#pragma once

#include <cstdint>

namespace pvc {
namespace {

struct Segment {
    int32_t offset;  // in elements, from the target voxel's first source value
    int32_t length;  // in elements
};

// MR target voxels, whose first source values are source[voxels[0]] ... source[voxels[MR - 1]], times one block of
// target channels. `accumulators` holds one row of the block per voxel; `initial` is the row to start from (a bias or
// zeros), or null to go on from the accumulators.
template <typename T>
using Microkernel = void (*)(const T* source, const int32_t* voxels, const Segment* segments, int64_t segment_count,
                             const T* weights, const T* initial, T* accumulators);

}  // namespace
}  // namespace pvc
