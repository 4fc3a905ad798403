// What a microkernel is given, and how it walks its reduction.
//
// An item is one target voxel (channels-last kernels) or one vector of target voxels along the width (planar kernel).
// The products of one item are a list of segments: runs of consecutive source values, `offset` away from the item's own
// position, that meet consecutive rows of packed weights.
#pragma once

#include <cstdint>

#include "../bfloat_pair.h"

namespace pvc {
namespace {

struct Segment {
    int32_t offset;  // in elements, from the item's first source value
    int32_t length;  // in elements
};

// MR items times one block of target channels. Sums start from `initial` (a bias or zeros, one value per channel of the
// block) or, when it is null, from `sums`; they end in `target` or, when it is null, in `sums`.
template <typename T>
struct TileArguments {
    const T* source;
    const int32_t* items;  // items[m]: the item's first source value
    const Segment* segments;
    int64_t segment_count;
    const T* weights;
    const Sum<T>* initial;
    bool stream;   // channels-last: `target` is written past the caches
    Sum<T>* sums;  // MR rows of NR vectors
    Sum<T>* target;
    const int64_t* places;   // places[m]: where the item begins in target
    int64_t channel_stride;  // planar: from one channel to the next in target
};

template <typename T>
using Microkernel = void (*)(const TileArguments<T>&);

}  // namespace
}  // namespace pvc
