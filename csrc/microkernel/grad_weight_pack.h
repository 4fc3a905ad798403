// A window of a tensor, copied into scratch memory with its channels in blocks of `lanes`: (depth, height, width,
// lanes).
//
// The window may reach beyond the tensor: zeros are written there, so what reads it knows no padding and no layout.
#pragma once

#include <cstring>

#include "../algorithm/tiling.h"
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
    int64_t lanes, filled;
    int64_t first_lane, repeat;
};

// `count` voxels that lie inside the tensor, `voxel` elements apart.
template <typename T>
inline void pack_voxels(const ChannelBlock<T>& block, const T* from, int64_t voxel, int64_t count, T* to) {
    const int64_t lanes = block.lanes, filled = block.filled, channel = block.strides.channel;
    const bool plain = block.repeat == 1 && block.first_lane == 0;
    if (plain && filled == lanes && voxel == lanes && (lanes == 1 || channel == 1)) {
        std::memcpy(to, from, static_cast<size_t>(count * lanes) * sizeof(T));
        return;
    }
    if (plain && filled == lanes && lanes == Vector<T>::lanes && channel == 1) {
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

// `count` voxels of a row of `size`, from position `first` in steps of `step`; zero outside the row.
template <typename T>
void pack_segment(const ChannelBlock<T>& block, const T* row, int64_t size, int64_t first, int64_t step, int64_t count,
                  T* to) {
    const int64_t before = smaller(first < 0 ? ceil_divide(-first, step) : 0, count);
    const int64_t end = larger(smaller(first < size ? ceil_divide(size - first, step) : 0, count), before);
    const int64_t lanes = block.lanes, voxel = block.strides.axis[2];
    std::memset(to, 0, static_cast<size_t>(before * lanes) * sizeof(T));
    if (end > before) {
        pack_voxels(block, row + (first + before * step) * voxel, step * voxel, end - before, to + before * lanes);
    }
    std::memset(to + end * lanes, 0, static_cast<size_t>((count - end) * lanes) * sizeof(T));
}

// Writes (packed[0].rows, packed[1].rows, packed[2].rows, lanes); `origin` is the position of the first voxel and tap.
template <typename T>
void pack_window(const ChannelBlock<T>& block, const GatherAxis axis[3], const PackedAxis packed[3],
                 const int64_t origin[3], T* to) {
    const int64_t row_size = packed[2].rows * block.lanes;
    for (int64_t d = 0; d < packed[0].rows; ++d) {
        const int64_t depth = origin[0] + source_position(axis[0], packed[0], d);
        for (int64_t h = 0; h < packed[1].rows; ++h, to += row_size) {
            const int64_t height = origin[1] + source_position(axis[1], packed[1], h);
            if (depth < 0 || depth >= axis[0].source_size || height < 0 || height >= axis[1].source_size) {
                std::memset(to, 0, static_cast<size_t>(row_size) * sizeof(T));
                continue;
            }
            const T* row = block.data + depth * block.strides.axis[0] + height * block.strides.axis[1];
            const int64_t size = axis[2].source_size, tile = packed[2].tile;
            if (packed[2].dense) {
                pack_segment(block, row, size, origin[2], 1, packed[2].rows, to);
                continue;
            }
            for (int64_t tap = 0; tap < axis[2].taps; ++tap) {
                pack_segment(block, row, size, origin[2] + tap * axis[2].tap_step, axis[2].source_step, tile,
                             to + tap * tile * block.lanes);
            }
        }
    }
}

}  // namespace
}  // namespace pvc
