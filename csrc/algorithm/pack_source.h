// The source of one tile, copied into scratch memory in the order of the kernel, zeros where the tensor ends.
//
// What follows then sees no padding, stride, dilation or layout. The copy touches each value a few times (the overlap
// of tiles), a small part of the taps * target channels multiplications that each value takes part in.
#pragma once

#include "tiling.h"
#include "transpose.h"

namespace pvc {
namespace {

// A box of the source: `channels` channels from `channel`, packed as if there were `width` (>= channels) of them.
struct SourceBlock {
    int64_t sample, channel, channels, width;
    int64_t origin[3];  // source position of the tile's first voxel and tap; may be outside the tensor
};

// Strides between voxels of a row and between channels, in elements.
struct RowStrides {
    int64_t voxel, channel;
};

// Inline, because rows are short: a call of memcpy costs as much as copying a row of 64 values.
template <typename T>
inline void fill_zero(T* to, int64_t count) {
    using V = Vector<T>;
    int64_t i = 0;
    for (; i + V::lanes <= count; i += V::lanes) V::store(to + i, typename V::type{});
    for (; i < count; ++i) to[i] = T{};
}

template <typename T>
inline void copy_values(const T* from, T* to, int64_t count) {
    using V = Vector<T>;
    if (count < V::lanes) {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
        return;
    }
    for (int64_t i = 0; i + V::lanes < count; i += V::lanes) V::store(to + i, V::load(from + i));
    V::store(to + count - V::lanes, V::load(from + count - V::lanes));
}

// rows x columns values. Where neither of the two is contiguous on a side (a lattice in ncdhw), value by value.
template <typename T>
void copy_matrix(const T* from, RowStrides from_strides, T* to, RowStrides to_strides, int64_t voxels,
                 int64_t channels) {
    if (from_strides.voxel == 1 && to_strides.voxel == 1) {
        for (int64_t c = 0; c < channels; ++c) {
            copy_values(from + c * from_strides.channel, to + c * to_strides.channel, voxels);
        }
    } else if (from_strides.channel == 1 && to_strides.channel == 1) {
        if (from_strides.voxel == channels && to_strides.voxel == channels) {
            copy_values(from, to, voxels * channels);
            return;
        }
        for (int64_t v = 0; v < voxels; ++v) {
            copy_values(from + v * from_strides.voxel, to + v * to_strides.voxel, channels);
        }
    } else if (from_strides.voxel == 1 && to_strides.channel == 1) {
        transpose(from, from_strides.channel, to, to_strides.voxel, channels, voxels);
    } else if (from_strides.channel == 1 && to_strides.voxel == 1) {
        transpose(from, from_strides.voxel, to, to_strides.channel, voxels, channels);
    } else {
        for (int64_t c = 0; c < channels; ++c, from += from_strides.channel, to += to_strides.channel) {
            for (int64_t v = 0; v < voxels; ++v) to[v * to_strides.voxel] = from[v * from_strides.voxel];
        }
    }
}

// One packed row whose depth and height are inside the tensor; `row` is its first voxel in the tensor.
template <typename T>
void pack_row(const GatherAxis& axis, const PackedAxis& packed, const SourceBlock& block, const T* row, RowStrides from,
              T* to, RowStrides packed_strides) {
    if (const int64_t step = even_step(axis, packed); step > 0) {
        const int64_t begin = smaller(ceil_divide(larger(-block.origin[2], 0), step), packed.rows);
        const int64_t inside = ceil_divide(larger(axis.source_size - block.origin[2], 0), step);
        const int64_t end = larger(smaller(inside, packed.rows), begin);
        if (packed_strides.voxel == 1) {
            for (int64_t c = 0; c < block.channels; ++c) {
                fill_zero(to + c * packed_strides.channel, begin);
                fill_zero(to + c * packed_strides.channel + end, packed.rows - end);
            }
        } else {
            fill_zero(to, begin * block.width);
            fill_zero(to + end * block.width, (packed.rows - end) * block.width);
        }
        copy_matrix(row + (block.origin[2] + begin * step) * from.voxel, {from.voxel * step, from.channel},
                    to + begin * packed_strides.voxel, packed_strides, end - begin, block.channels);
        return;
    }
    for (int64_t w = 0; w < packed.rows; ++w) {
        const int64_t position = block.origin[2] + source_position(axis, packed, w);
        const bool inside = position >= 0 && position < axis.source_size;
        for (int64_t c = 0; c < block.channels; ++c) {
            to[w * packed_strides.voxel + c * packed_strides.channel] =
                inside ? row[position * from.voxel + c * from.channel] : T{};
        }
    }
}

// The voxels of a block, row by row; `source` is the first channel of the sample, `to` the first packed value.
template <typename T>
void pack_rows(const Gather& gather, const PackedAxis packed[3], const SourceBlock& block, const T* source,
               RowStrides from, T* to, RowStrides packed_strides) {
    const GatherAxis* axis = gather.axis;
    const bool planar = packed_strides.voxel == 1;
    for (int64_t d = 0; d < packed[0].rows; ++d) {
        const int64_t depth = block.origin[0] + source_position(axis[0], packed[0], d);
        for (int64_t h = 0; h < packed[1].rows; ++h, to += packed[2].rows * packed_strides.voxel) {
            const int64_t height = block.origin[1] + source_position(axis[1], packed[1], h);
            if (depth < 0 || depth >= axis[0].source_size || height < 0 || height >= axis[1].source_size) {
                const int64_t runs = planar ? block.channels : 1, run = packed[2].rows * packed_strides.voxel;
                for (int64_t c = 0; c < runs; ++c) fill_zero(to + c * packed_strides.channel, run);
                continue;
            }
            const int64_t row = (depth * axis[1].source_size + height) * axis[2].source_size;
            pack_row(axis[2], packed[2], block, source + row * from.voxel, from, to, packed_strides);
        }
    }
}

// One channel of the ncdhw layout as one plane: rows are copied, nothing else, and what is the same for every row is
// found once.
template <typename T>
void pack_plane(const Gather& gather, const PackedAxis packed[3], const SourceBlock& block, const T* channel, T* to) {
    const GatherAxis* axis = gather.axis;
    const int64_t rows = packed[2].rows, size = axis[2].source_size;
    const int64_t begin = smaller(larger(-block.origin[2], 0), rows);
    const int64_t end = larger(smaller(size - block.origin[2], rows), begin);
    for (int64_t d = 0; d < packed[0].rows; ++d) {
        const int64_t depth = block.origin[0] + source_position(axis[0], packed[0], d);
        const bool depth_inside = depth >= 0 && depth < axis[0].source_size;
        for (int64_t h = 0; h < packed[1].rows; ++h, to += rows) {
            const int64_t height = block.origin[1] + source_position(axis[1], packed[1], h);
            if (!depth_inside || height < 0 || height >= axis[1].source_size) {
                fill_zero(to, rows);
                continue;
            }
            const T* row = channel + (depth * axis[1].source_size + height) * size + block.origin[2];
            for (int64_t w = 0; w < begin; ++w) to[w] = T{};
            copy_values(row + begin, to + begin, end - begin);
            for (int64_t w = end; w < rows; ++w) to[w] = T{};
        }
    }
}

// `to` is [axis 0 rows][axis 1 rows][axis 2 rows][width], or when planar [width][axis 0 rows][axis 1 rows][axis 2
// rows].
template <typename T>
void pack_source(const Gather& gather, const PackedAxis packed[3], bool planar, const SourceBlock& block,
                 const T* source, T* to) {
    const GatherAxis* axis = gather.axis;
    const int64_t all_channels = gather.groups * gather.source_channels;
    const int64_t voxels = axis[0].source_size * axis[1].source_size * axis[2].source_size;
    const int64_t packed_voxels = packed[0].rows * packed[1].rows * packed[2].rows;
    const bool last = gather.source_layout == Layout::ndhwc;
    const RowStrides from = last ? RowStrides{all_channels, 1} : RowStrides{1, voxels};
    const RowStrides strides = planar ? RowStrides{1, packed_voxels} : RowStrides{block.width, 1};
    const T* first = source + block.sample * all_channels * voxels + block.channel * from.channel;
    if (block.width > block.channels) {
        const int64_t kept = planar ? block.channels * packed_voxels : 0;
        fill_zero(to + kept, block.width * packed_voxels - kept);
    }
    if (planar && !last && packed[2].dense) {
        for (int64_t c = 0; c < block.channels; ++c) {
            pack_plane(gather, packed, block, first + c * voxels, to + c * packed_voxels);
        }
    } else {
        pack_rows(gather, packed, block, first, from, to, strides);
    }
}

// Reads what a dense window will be packed from, an ndhwc source, row after row: processors see that coming, and find
// it in L2 when parts of the window are packed in another order.
template <typename T>
void read_source(const Gather& gather, const PackedAxis packed[3], const SourceBlock& block, const T* source) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    const GatherAxis* axis = gather.axis;
    const int64_t channels = gather.groups * gather.source_channels;
    int64_t first[3], last[3];
    for (int a = 0; a < 3; ++a) {
        const int64_t end = source_position(axis[a], packed[a], packed[a].rows - 1) + 1;
        first[a] = larger(block.origin[a], 0);
        last[a] = smaller(block.origin[a] + end, axis[a].source_size);
    }
    for (int64_t d = first[0]; d < last[0]; ++d) {
        for (int64_t h = first[1]; h < last[1]; ++h) {
            const int64_t row =
                ((block.sample * axis[0].source_size + d) * axis[1].source_size + h) * axis[2].source_size;
            for (int64_t w = first[2]; w < last[2]; ++w) {
                const T* voxel = source + (row + w) * channels + block.channel;
                for (int64_t c = 0; c < block.channels; c += line) asm volatile("" : : "r"(voxel[c]));
            }
        }
    }
}

}  // namespace
}  // namespace pvc
