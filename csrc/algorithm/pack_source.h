// The source of one tile, copied into scratch memory: channels last, zeros where the tensor ends.
//
// What follows then sees no padding, stride, dilation or layout. The copy touches each value a few times (the overlap
// of tiles), a small part of the taps * target channels multiplications that each value takes part in.
#pragma once

#include <cstring>

#include "tiling.h"
#include "transpose.h"

namespace pvc {
namespace {

// A box of the source: `channels` channels from `channel`, packed `width` (>= channels) apart.
struct SourceBlock {
    int64_t sample, channel, channels, width;
    int64_t origin[3];  // source position of the tile's first voxel and tap; may be outside the tensor
};

// One packed row of `rows` voxels whose depth and height are inside the tensor.
template <typename T>
void pack_row_ndhwc(const T* row, const GatherAxis& axis, const PackedAxis& packed, int64_t channel_stride,
                    const SourceBlock& block, T* to) {
    const int64_t size = axis.source_size, origin = block.origin[2];
    if (packed.dense && block.channels == block.width && block.channels == channel_stride) {
        const int64_t before = smaller(larger(-origin, 0), packed.rows);
        const int64_t end = larger(smaller(size - origin, packed.rows), before);
        std::memset(to, 0, static_cast<size_t>(before * block.width) * sizeof(T));
        if (end > before) {
            std::memcpy(to + before * block.width, row + (origin + before) * channel_stride,
                        static_cast<size_t>((end - before) * block.width) * sizeof(T));
        }
        std::memset(to + end * block.width, 0, static_cast<size_t>((packed.rows - end) * block.width) * sizeof(T));
        return;
    }
    for (int64_t w = 0; w < packed.rows; ++w, to += block.width) {
        const int64_t position = origin + source_position(axis, packed, w);
        const bool inside = position >= 0 && position < size;
        const int64_t count = inside ? block.channels : 0;
        if (inside) std::memcpy(to, row + position * channel_stride, static_cast<size_t>(count) * sizeof(T));
        for (int64_t c = count; c < block.width; ++c) to[c] = 0;
    }
}

template <typename T>
void pack_row_ncdhw(const T* row, const GatherAxis& axis, const PackedAxis& packed, int64_t channel_stride,
                    const SourceBlock& block, T* to) {
    const int64_t size = axis.source_size, origin = block.origin[2];
    if (packed.dense) {
        const int64_t before = smaller(larger(-origin, 0), packed.rows);
        const int64_t end = larger(smaller(size - origin, packed.rows), before);
        std::memset(to, 0, static_cast<size_t>(before * block.width) * sizeof(T));
        if (block.width > block.channels) {
            std::memset(to + before * block.width, 0, static_cast<size_t>((end - before) * block.width) * sizeof(T));
        }
        transpose(row + origin + before, channel_stride, to + before * block.width, block.width, block.channels,
                  end - before);
        std::memset(to + end * block.width, 0, static_cast<size_t>((packed.rows - end) * block.width) * sizeof(T));
        return;
    }
    for (int64_t w = 0; w < packed.rows; ++w, to += block.width) {
        const int64_t position = origin + source_position(axis, packed, w);
        const int64_t count = position >= 0 && position < size ? block.channels : 0;
        for (int64_t c = 0; c < count; ++c) to[c] = row[position + c * channel_stride];
        for (int64_t c = count; c < block.width; ++c) to[c] = 0;
    }
}

// `to` is [axis 0 rows][axis 1 rows][axis 2 rows][width].
template <typename T>
void pack_source(const Gather& gather, const PackedAxis packed[3], const SourceBlock& block, const T* source, T* to) {
    const GatherAxis* axis = gather.axis;
    const int64_t all_channels = gather.groups * gather.source_channels;
    const int64_t voxels = axis[0].source_size * axis[1].source_size * axis[2].source_size;
    const bool last = gather.layout == Layout::ndhwc;
    const T* first = source + block.sample * all_channels * voxels + block.channel * (last ? 1 : voxels);
    const int64_t row_size = packed[2].rows * block.width;
    for (int64_t d = 0; d < packed[0].rows; ++d) {
        const int64_t depth = block.origin[0] + source_position(axis[0], packed[0], d);
        for (int64_t h = 0; h < packed[1].rows; ++h, to += row_size) {
            const int64_t height = block.origin[1] + source_position(axis[1], packed[1], h);
            if (depth < 0 || depth >= axis[0].source_size || height < 0 || height >= axis[1].source_size) {
                std::memset(to, 0, static_cast<size_t>(row_size) * sizeof(T));
                continue;
            }
            const int64_t row = (depth * axis[1].source_size + height) * axis[2].source_size;
            if (last) {
                pack_row_ndhwc(first + row * all_channels, axis[2], packed[2], all_channels, block, to);
            } else {
                pack_row_ncdhw(first + row, axis[2], packed[2], voxels, block, to);
            }
        }
    }
}

}  // namespace
}  // namespace pvc
