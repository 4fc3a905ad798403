// How a target is cut into tiles, and how the source of one tile lies in scratch memory.
//
// Per axis, tap t of target voxel j (both counted inside the tile) reads source position j * source_step + t *
// tap_step. Packed, it is row j * voxel_step + t * tap_step' of one of two orders, whichever is shorter:
//   dense:     every source position from the first to the last, rows shared by neighbouring voxels;
//   separated: one run of `tile` rows per tap (wide dilations, strides larger than the kernel).
#pragma once

#include "../isa.h"
#include "gather.h"

namespace pvc {
namespace {

struct PackedAxis {
    int64_t tile;  // target voxels
    int64_t rows;  // packed rows
    int64_t voxel_step, tap_step;
    bool dense;
};

inline PackedAxis pack_axis(const GatherAxis& axis, int64_t tile) {
    if (axis.taps == 0) return {tile, 0, 0, 0, true};
    const int64_t dense = (tile - 1) * axis.source_step + (axis.taps - 1) * axis.tap_step + 1;
    if (dense <= tile * axis.taps) return {tile, dense, axis.source_step, axis.tap_step, true};
    return {tile, tile * axis.taps, 1, tile, false};
}

// The source position, relative to that of the tile's first voxel and tap, that packed row `row` holds.
inline int64_t source_position(const GatherAxis& axis, const PackedAxis& packed, int64_t row) {
    if (packed.dense) return row;
    return row % packed.tile * axis.source_step + row / packed.tile * axis.tap_step;
}

struct Tiling {
    PackedAxis axis[3];
    int64_t tiles[3];

    int64_t voxels() const { return axis[0].tile * axis[1].tile * axis[2].tile; }
    int64_t packed_voxels() const { return axis[0].rows * axis[1].rows * axis[2].rows; }
    int64_t count() const { return tiles[0] * tiles[1] * tiles[2]; }
};

inline Tiling cut(const Gather& gather, const int64_t pieces[3]) {
    Tiling tiling = {};
    for (int axis = 0; axis < 3; ++axis) {
        const int64_t count = gather.axis[axis].count;
        const int64_t tile = ceil_divide(count, pieces[axis]);
        tiling.axis[axis] = pack_axis(gather.axis[axis], tile);
        tiling.tiles[axis] = ceil_divide(count, tile);
    }
    return tiling;
}

// Starts from the whole target and halves one axis after another, each time the one that costs least repeated packing,
// until a tile's source and sums fit and there are tasks enough to share out. Depends on the problem alone, never on
// the number of threads.
inline Tiling choose_tiling(const Gather& gather, int64_t packed_limit, int64_t voxel_limit, int64_t other_tasks) {
    constexpr int64_t kTasks = 16, kSmallTile = 96;
    int64_t pieces[3] = {1, 1, 1};
    Tiling tiling = cut(gather, pieces);
    for (;;) {
        const bool too_large = tiling.packed_voxels() > packed_limit || tiling.voxels() > voxel_limit;
        const bool too_few = tiling.count() * other_tasks < kTasks && tiling.voxels() > kSmallTile;
        if (!too_large && !too_few) return tiling;
        int best_axis = -1;
        double best_cost = 0;
        for (int axis = 0; axis < 3; ++axis) {
            if (tiling.axis[axis].tile == 1) continue;
            int64_t finer[3] = {pieces[0], pieces[1], pieces[2]};
            finer[axis] = ceil_divide(gather.axis[axis].count, ceil_divide(tiling.axis[axis].tile, 2));
            const Tiling candidate = cut(gather, finer);
            const double cost =
                static_cast<double>(candidate.packed_voxels()) / static_cast<double>(candidate.voxels());
            if (best_axis < 0 || cost < best_cost) {
                best_axis = axis;
                best_cost = cost;
            }
        }
        if (best_axis < 0) return tiling;
        pieces[best_axis] = ceil_divide(gather.axis[best_axis].count, ceil_divide(tiling.axis[best_axis].tile, 2));
        tiling = cut(gather, pieces);
    }
}

}  // namespace
}  // namespace pvc
