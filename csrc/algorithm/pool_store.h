// Pooled rows written to where they belong in the pooled tensor.
#pragma once

#include "max_pool.h"
#include "sparse_gradient.h"

namespace pvc {
namespace {

template <typename T>
struct PooledTarget {
    T* pooled;
    uint8_t* code;  // or null
    VolumeStrides strides;
};

template <typename Integer>
void narrow(const Integer* from, uint8_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(from[i]);
}

template <typename Integer>
void store_codes(const Integer* codes, RowStrides from, uint8_t* code, RowStrides to, int64_t voxels,
                 int64_t channels) {
    if (from.voxel == channels && to.voxel == channels) {
        narrow(codes, code, voxels * channels);
    } else if (from.channel == 1 && to.channel == 1) {
        for (int64_t v = 0; v < voxels; ++v) narrow(codes + v * from.voxel, code + v * to.voxel, channels);
    } else if (from.voxel == 1 && to.voxel == 1) {
        for (int64_t c = 0; c < channels; ++c) narrow(codes + c * from.channel, code + c * to.channel, voxels);
    } else {
        for (int64_t v = 0; v < voxels; ++v) {
            for (int64_t c = 0; c < channels; ++c) {
                code[v * to.voxel + c * to.channel] = static_cast<uint8_t>(codes[v * from.voxel + c * from.channel]);
            }
        }
    }
}

// Pools the row of windows from `cell` on into `channels` channels of the target from `channel` on, by way of scratch
// memory where the orders differ. Of `row` the caller sets the values, `depth`, `height` and `cells`.
template <typename T>
void pool_row(const PooledProblem& problem, const PooledTarget<T>& target, bool planar, int64_t sample,
              const int64_t cell[3], int64_t channel, int64_t channels, PoolRow<T>& row) {
    using Integer = typename VectorType<T>::integer;
    const VolumeStrides& strides = target.strides;
    const int64_t width = planar ? channels : row.channels;
    T* row_pooled = scratch<T>(Scratch::tile_pooled, row.cells * width);
    row.codes = scratch<Integer>(Scratch::tile_codes, row.cells * width);
    row.cell = cell[2];

    const int64_t place = sample * strides.sample + channel * strides.channel + cell[0] * strides.axis[0] +
                          cell[1] * strides.axis[1] + cell[2] * strides.axis[2];
    const bool last = problem.conv.layout == Layout::ndhwc;
    const bool direct = planar ? !last : last && channels == width;
    const RowStrides own = planar ? RowStrides{1, row.cells} : RowStrides{width, 1};
    row.code_pitch = planar ? own.channel : own.voxel;
    row.pitch = !direct ? row.code_pitch : planar ? strides.channel : strides.axis[2];
    row.pooled = direct ? target.pooled + place : row_pooled;
    pool_kernel<T>(problem.activation, planar)(problem, row);
    const RowStrides to = {strides.axis[2], strides.channel};
    if (!direct) copy_matrix(row_pooled, own, target.pooled + place, to, row.cells, channels);
    if (target.code != nullptr) store_codes(row.codes, own, target.code + place, to, row.cells, channels);
}

}  // namespace
}  // namespace pvc
