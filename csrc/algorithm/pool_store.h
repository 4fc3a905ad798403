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

// Codes of a row of windows from one order to another; in each, channels or voxels are neighbours.
inline void copy_codes(const uint8_t* from, RowStrides own, uint8_t* code, RowStrides to, int64_t voxels,
                       int64_t channels) {
    if (own.channel == 1 && to.channel == 1) {
        for (int64_t v = 0; v < voxels; ++v) {
            std::memcpy(code + v * to.voxel, from + v * own.voxel, static_cast<size_t>(channels));
        }
    } else if (own.channel == 1) {
        transpose(from, own.voxel, code, to.channel, voxels, channels);
    } else {
        transpose(from, own.channel, code, to.voxel, channels, voxels);
    }
}

// Pools the row of windows from `cell` on into `channels` channels of the target from `channel` on, by way of scratch
// memory where the orders differ. Of `row` the caller sets the values, `depth`, `height` and `cells`.
template <typename T>
void pool_row(const PooledProblem& problem, const PooledTarget<T>& target, bool planar, int64_t sample,
              const int64_t cell[3], int64_t channel, int64_t channels, PoolRow<T>& row) {
    const VolumeStrides& strides = target.strides;
    const RowStrides to = {strides.axis[2], strides.channel};
    row.cell = cell[2];
    row.channels = channels;
    const int64_t place = sample * strides.sample + channel * strides.channel + cell[0] * strides.axis[0] +
                          cell[1] * strides.axis[1] + cell[2] * strides.axis[2];
    T* pooled = target.pooled + place;
    uint8_t* code = target.code == nullptr ? nullptr : target.code + place;
    const auto run = pool_kernel<T>(problem.activation, planar);
    if (planar != (problem.conv.layout == Layout::ndhwc)) {
        row.pitch = row.code_pitch = planar ? to.channel : to.voxel;
        row.pooled = pooled;
        row.codes = code;
        return run(problem, row);
    }
    const RowStrides own = planar ? RowStrides{1, row.cells} : RowStrides{channels, 1};
    row.pitch = row.code_pitch = planar ? own.channel : own.voxel;
    row.pooled = scratch<T>(Scratch::tile_pooled, row.cells * channels);
    row.codes = code == nullptr ? nullptr : scratch<uint8_t>(Scratch::tile_codes, row.cells * channels);
    run(problem, row);
    copy_matrix(row.pooled, own, pooled, to, row.cells, channels);
    if (code != nullptr) copy_codes(row.codes, own, code, to, row.cells, channels);
}

}  // namespace
}  // namespace pvc
