// The sums of one tile and one block of target channels, written to where they belong in the target tensor.
#pragma once

#include "../arena.h"
#include "../narrow.h"
#include "tiling.h"
#include "transpose.h"

namespace pvc {
namespace {

// A box of the target: voxels first .. first + count - 1 of the gather, `channels` channels from `channel`.
struct TargetBlock {
    int64_t sample, channel, channels, width;  // the sums of a voxel are `width` apart
    int64_t first[3], count[3];
};

// Where the vector that covers voxel `item` of a row of `count` voxels begins: the last one ends with the row.
inline int64_t vector_begin(int64_t item, int64_t count, int64_t lanes) {
    return larger(smaller(item, count - lanes), 0);
}

template <typename T>
void store_voxels_ndhwc(const T* sums, const TargetBlock& block, int64_t voxels, int64_t stride, T* to) {
    using V = Vector<T>;
    const int64_t whole = block.channels / V::lanes * V::lanes;
    for (int64_t v = 0; v < voxels; ++v, sums += block.width, to += stride) {
        for (int64_t c = 0; c < whole; c += V::lanes) V::store(to + c, V::load(sums + c));
        for (int64_t c = whole; c < block.channels; ++c) to[c] = sums[c];
    }
}

#if defined(PVC_BFLOAT_PAIRS)
template <typename S>
void narrow_voxels(const float* sums, const TargetBlock& block, int64_t voxels, int64_t stride, S* to) {
    for (int64_t v = 0; v < voxels; ++v, sums += block.width, to += stride) copy_narrow(sums, to, block.channels);
}

inline void store_voxels_ndhwc(const float* sums, const TargetBlock& block, int64_t voxels, int64_t stride,
                               Bfloat16* to) {
    narrow_voxels(sums, block, voxels, stride, to);
}

inline void store_voxels_ndhwc(const float* sums, const TargetBlock& block, int64_t voxels, int64_t stride,
                               Float16* to) {
    narrow_voxels(sums, block, voxels, stride, to);
}

template <typename S>
void narrow_transposed(const float* from, int64_t from_stride, S* to, int64_t to_stride, int64_t rows,
                       int64_t columns) {
    float* planes = scratch<float>(Scratch::tile_narrowed, rows * columns);
    transpose(from, from_stride, planes, rows, rows, columns);
    for (int64_t c = 0; c < columns; ++c) copy_narrow(planes + c * rows, to + c * to_stride, rows);
}

inline void transpose(const float* from, int64_t from_stride, Bfloat16* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
    narrow_transposed(from, from_stride, to, to_stride, rows, columns);
}

inline void transpose(const float* from, int64_t from_stride, Float16* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
    narrow_transposed(from, from_stride, to, to_stride, rows, columns);
}

inline void assign(Float16& to, float sum) { to = to_float16(sum); }
#endif

// Few columns of rows that are `from_stride` >= lanes values apart: whole vectors of a row are read, and what is no
// column is left out.
template <typename T>
void transpose_narrow(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
    using V = Vector<T>;
    for (int64_t r = 0; r < rows; r += V::lanes) {
        const int64_t first = smaller(r, rows - V::lanes);
        typename V::type block[V::lanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::lanes; ++i) block[i] = V::load(from + (first + i) * from_stride);
        Transpose<T>::registers(block);
        for (int64_t c = 0; c < columns; ++c) V::store(to + c * to_stride + first, block[c]);
    }
}

// The sums of one row, `width` apart, as rows of planes.
template <typename T>
void store_planes(const T* sums, int64_t width, T* to, int64_t plane, int64_t voxels, int64_t channels) {
    if (channels < Vector<T>::lanes && width >= Vector<T>::lanes && voxels >= Vector<T>::lanes) {
        transpose_narrow(sums, width, to, plane, voxels, channels);
    } else {
        transpose(sums, width, to, plane, voxels, channels);
    }
}

#if defined(PVC_BFLOAT_PAIRS)
inline void store_planes(const float* sums, int64_t width, Bfloat16* to, int64_t plane, int64_t voxels,
                         int64_t channels) {
    transpose(sums, width, to, plane, voxels, channels);
}

inline void store_planes(const float* sums, int64_t width, Float16* to, int64_t plane, int64_t voxels,
                         int64_t channels) {
    transpose(sums, width, to, plane, voxels, channels);
}
#endif

inline void assign(float& to, float sum) { to = sum; }
inline void assign(double& to, double sum) { to = sum; }
inline void assign(Bfloat16& to, float sum) { to = to_bfloat16(sum); }

// Sums of a channels-last kernel: [count 0][count 1][count 2][width].
template <typename T, typename S>
void store_channels_last(const Gather& gather, const TargetBlock& block, const T* sums, S* target) {
    const GatherAxis* axis = gather.axis;
    const int64_t all_channels = gather.groups * gather.target_channels;
    const int64_t voxels = axis[0].target_size * axis[1].target_size * axis[2].target_size;
    const bool last = gather.layout == Layout::ndhwc;
    S* first = target + block.sample * all_channels * voxels + block.channel * (last ? 1 : voxels);
    // Rows that follow one another in memory are one run.
    const bool joined = axis[2].target_step == 1 && block.count[2] == axis[2].target_size && axis[1].target_step == 1;
    const int64_t runs = joined ? 1 : block.count[1], run = joined ? block.count[1] * block.count[2] : block.count[2];
    for (int64_t d = 0; d < block.count[0]; ++d) {
        const int64_t depth = axis[0].target_first + (block.first[0] + d) * axis[0].target_step;
        for (int64_t h = 0; h < runs; ++h, sums += run * block.width) {
            const int64_t height = axis[1].target_first + (block.first[1] + h) * axis[1].target_step;
            const int64_t width = axis[2].target_first + block.first[2] * axis[2].target_step;
            const int64_t voxel = (depth * axis[1].target_size + height) * axis[2].target_size + width;
            if (last) {
                store_voxels_ndhwc(sums, block, run, axis[2].target_step * all_channels, first + voxel * all_channels);
            } else if (axis[2].target_step == 1) {
                store_planes(sums, block.width, first + voxel, voxels, run, block.channels);
            } else {
                for (int64_t c = 0; c < block.channels; ++c) {
                    S* to = first + voxel + c * voxels;
                    for (int64_t w = 0; w < run; ++w) assign(to[w * axis[2].target_step], sums[w * block.width + c]);
                }
            }
        }
    }
}

// Sums of the planar kernel: [count 0][count 1][vectors along the width][width][lanes]. The last vector of a row ends
// with the row, or begins with it when the row is shorter than a vector.
template <typename T>
void store_planar(const Gather& gather, const TargetBlock& block, const T* sums, T* target) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const GatherAxis* axis = gather.axis;
    const int64_t all_channels = gather.groups * gather.target_channels;
    const int64_t voxels = axis[0].target_size * axis[1].target_size * axis[2].target_size;
    const bool last = gather.layout == Layout::ndhwc;
    const int64_t voxel_stride = last ? all_channels : 1, channel_stride = last ? 1 : voxels;
    T* first = target + block.sample * all_channels * voxels + block.channel * channel_stride;
    for (int64_t d = 0; d < block.count[0]; ++d) {
        const int64_t depth = axis[0].target_first + (block.first[0] + d) * axis[0].target_step;
        for (int64_t h = 0; h < block.count[1]; ++h) {
            const int64_t height = axis[1].target_first + (block.first[1] + h) * axis[1].target_step;
            for (int64_t item = 0; item < block.count[2]; item += lanes, sums += block.width * lanes) {
                const int64_t begin = vector_begin(item, block.count[2], lanes);
                const int64_t width = axis[2].target_first + (block.first[2] + begin) * axis[2].target_step;
                T* to = first + ((depth * axis[1].target_size + height) * axis[2].target_size + width) * voxel_stride;
                const int64_t count = smaller(lanes, block.count[2] - begin);
                for (int64_t c = 0; c < block.channels; ++c) {
                    for (int64_t w = 0; w < count; ++w) {
                        to[c * channel_stride + w * axis[2].target_step * voxel_stride] = sums[c * lanes + w];
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace pvc
