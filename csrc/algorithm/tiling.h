// How a target is cut into tiles of whole cells (voxels, or the windows of a pooling), and how the source of one tile
// lies in scratch memory.
//
// Per axis, tap t of target voxel j (both counted inside the tile) reads source position j * source_step + t *
// tap_step. Packed, it is row j * voxel_step + t * tap_step' of one of two orders, whichever is shorter:
//   dense:     every source position from the first to the last, rows shared by neighbouring voxels;
//   separated: one run of `tile` rows per tap (wide dilations, strides larger than the kernel).
// Kernels that load neighbouring voxels as one vector need voxel_step 1 along the width, which separated always has.
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

inline PackedAxis pack_axis(const GatherAxis& axis, int64_t tile, bool unit_step) {
    if (axis.taps == 0) return {tile, 0, 0, 0, true};
    const int64_t dense = (tile - 1) * axis.source_step + (axis.taps - 1) * axis.tap_step + 1;
    if (dense <= tile * axis.taps && !(unit_step && axis.source_step != 1)) {
        return {tile, dense, axis.source_step, axis.tap_step, true};
    }
    return {tile, tile * axis.taps, 1, tile, false};
}

// The source position, relative to that of the tile's first voxel and tap, that packed row `row` holds.
inline int64_t source_position(const GatherAxis& axis, const PackedAxis& packed, int64_t row) {
    if (packed.dense) return row;
    return row % packed.tile * axis.source_step + row / packed.tile * axis.tap_step;
}

// What source_position adds from each row to the next, or 0 where that differs.
inline int64_t even_step(const GatherAxis& axis, const PackedAxis& packed) {
    return packed.dense ? 1 : packed.tile == 1 ? axis.tap_step : 0;
}

struct Tiling {
    PackedAxis axis[3];
    int64_t cells[3];  // of one tile
    int64_t tiles[3];

    int64_t voxels() const { return axis[0].tile * axis[1].tile * axis[2].tile; }
    int64_t packed_voxels() const { return axis[0].rows * axis[1].rows * axis[2].rows; }
    int64_t count() const { return tiles[0] * tiles[1] * tiles[2]; }
};

constexpr int64_t kFewVoxels = 96;  // a tile of these is not cut for the sake of more tasks

struct TileLimits {
    int64_t packed_voxels, voxels;  // at most, per tile
    int64_t other_tasks;            // tasks per tile: samples and units of channels
    int64_t vector;                 // voxels along the width that a kernel computes at once
    bool whole_rows = false;        // cut the width last: rows are transposed, or interleaved
    int64_t few = kFewVoxels;
};

inline Tiling cut(const Gather& gather, const int64_t pieces[3], const TileLimits& limits) {
    Tiling tiling = {};
    for (int axis = 0; axis < 3; ++axis) {
        const CellAxis cells = gather.cells(axis);
        const int64_t tile = ceil_divide(cells.count, pieces[axis]), voxels = (tile - 1) * cells.step + cells.extent;
        tiling.axis[axis] = pack_axis(gather.axis[axis], voxels, axis == 2 && limits.vector > 1);
        tiling.cells[axis] = tile;
        tiling.tiles[axis] = ceil_divide(cells.count, tile);
    }
    return tiling;
}

// Starts from the whole target and halves one axis after another, each time the one that costs least repeated packing
// and fewest idle lanes, until a tile's source and sums fit and there are tasks enough to share out. Depends on the
// problem and the machine's caches, never on the number of threads.
inline Tiling choose_tiling(const Gather& gather, const TileLimits& limits) {
    constexpr int64_t kTasks = 16;
    int64_t pieces[3] = {1, 1, 1};
    Tiling tiling = cut(gather, pieces, limits);
    for (;;) {
        const bool too_large = tiling.packed_voxels() > limits.packed_voxels || tiling.voxels() > limits.voxels;
        const bool too_few = tiling.count() * limits.other_tasks < kTasks && tiling.voxels() > limits.few;
        if (!too_large && !too_few) return tiling;
        Tiling best = tiling;
        double best_cost = 0;
        int best_axis = -1;
        for (int axis = 0; axis < 3; ++axis) {
            if (tiling.cells[axis] == 1) continue;
            if (limits.whole_rows && axis == 2 && tiling.cells[0] * tiling.cells[1] > 1) continue;
            int64_t finer[3] = {pieces[0], pieces[1], pieces[2]};
            finer[axis] = ceil_divide(gather.cells(axis).count, ceil_divide(tiling.cells[axis], 2));
            const Tiling candidate = cut(gather, finer, limits);
            const int64_t width = candidate.axis[2].tile;
            const double lanes_used =
                static_cast<double>(width) / static_cast<double>(ceil_divide(width, limits.vector) * limits.vector);
            const double cost = static_cast<double>(larger(candidate.packed_voxels(), 1)) /
                                (static_cast<double>(candidate.voxels()) * lanes_used);
            if (best_axis < 0 || cost < best_cost) {
                best = candidate;
                best_cost = cost;
                best_axis = axis;
            }
        }
        if (best_axis < 0) return tiling;
        tiling = best;
        pieces[best_axis] = tiling.tiles[best_axis];
    }
}

}  // namespace
}  // namespace pvc
