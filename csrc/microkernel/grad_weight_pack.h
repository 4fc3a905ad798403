// A window of a tensor, copied into scratch memory with its channels in blocks of `lanes`: (depth, height, width,
// lanes).
//
// The window may reach beyond the tensor: zeros are written there, so what reads it knows no padding and no layout.
#pragma once

#include <cstring>

#include "../algorithm/transpose.h"
#include "../problem.h"

namespace pvc {
namespace {

// Distances in elements between neighbours along the channels and the three axes of a dense tensor.
struct VolumeStrides {
    int64_t sample, channel, axis[3];
};

inline VolumeStrides volume_strides(Layout layout, int64_t channels, const int64_t size[3]) {
    const int64_t voxels = size[0] * size[1] * size[2];
    const int64_t voxel = layout == Layout::ndhwc ? channels : 1;
    return {
        channels * voxels, layout == Layout::ndhwc ? 1 : voxels, {size[1] * size[2] * voxel, size[2] * voxel, voxel}};
}

// One block of channels of one sample. Lane i holds channel (first_lane + i) / repeat, counted from `data`; lanes from
// `filled` on are zero.
template <typename T>
struct ChannelBlock {
    const T* data;
    VolumeStrides strides;
    const int64_t* size;
    int64_t lanes, filled;
    int64_t first_lane, repeat;
};

// `count` voxels of one row that lie inside the tensor.
template <typename T>
inline void pack_voxels(const ChannelBlock<T>& block, const T* from, int64_t count, T* to) {
    constexpr int64_t vector_lanes = Vector<T>::lanes;
    const int64_t lanes = block.lanes, filled = block.filled;
    const int64_t channel = block.strides.channel, voxel = block.strides.axis[2];
    const bool plain = block.repeat == 1 && block.first_lane == 0;
    if (plain && filled == lanes && voxel == lanes && (lanes == 1 || channel == 1)) {
        std::memcpy(to, from, static_cast<size_t>(count * lanes) * sizeof(T));
        return;
    }
    if (plain && filled == lanes && lanes == vector_lanes && channel == 1) {
        for (int64_t w = 0; w < count; ++w) Vector<T>::store(to + w * lanes, Vector<T>::load(from + w * voxel));
        return;
    }
    if (filled < lanes) std::memset(to, 0, static_cast<size_t>(count * lanes) * sizeof(T));
    if (plain && voxel == 1) {
        transpose(from, channel, to, lanes, filled, count);
        return;
    }
    for (int64_t lane = 0; lane < filled; ++lane) {
        const T* values = from + (block.first_lane + lane) / block.repeat * channel;
        for (int64_t w = 0; w < count; ++w) to[w * lanes + lane] = values[w * voxel];
    }
}

// Writes extent[0] x extent[1] x extent[2] voxels from `origin` on; `plane` and `row` are distances in `to`, in
// elements.
template <typename T>
void pack_window(const ChannelBlock<T>& block, const int64_t origin[3], const int64_t extent[3], T* to, int64_t plane,
                 int64_t row) {
    const int64_t* size = block.size;
    const int64_t before = smaller(larger(-origin[2], 0), extent[2]);
    const int64_t end = larger(smaller(size[2] - origin[2], extent[2]), before);
    for (int64_t d = 0; d < extent[0]; ++d) {
        for (int64_t h = 0; h < extent[1]; ++h) {
            T* out = to + d * plane + h * row;
            const int64_t depth = origin[0] + d, height = origin[1] + h;
            if (depth < 0 || depth >= size[0] || height < 0 || height >= size[1] || end == before) {
                std::memset(out, 0, static_cast<size_t>(extent[2] * block.lanes) * sizeof(T));
                continue;
            }
            const T* from = block.data + depth * block.strides.axis[0] + height * block.strides.axis[1] +
                            (origin[2] + before) * block.strides.axis[2];
            std::memset(out, 0, static_cast<size_t>(before * block.lanes) * sizeof(T));
            pack_voxels(block, from, end - before, out + before * block.lanes);
            std::memset(out + end * block.lanes, 0, static_cast<size_t>((extent[2] - end) * block.lanes) * sizeof(T));
        }
    }
}

}  // namespace
}  // namespace pvc
