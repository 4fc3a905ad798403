// How the tiles of a problem with few input channels are cut into slabs: whole rows, few enough for L2, tasks enough to
// share out.
#pragma once

#include "first_layer_source.h"

namespace pvc {
namespace {

struct FirstLayerSlabs {
    int64_t tiles[3], most[3], pieces[3];

    FirstLayerSlabs(const int64_t all[3], int64_t batch, int64_t voxel_bytes) {
        constexpr int64_t kTasks = 16;
        for (int a = 0; a < 3; ++a) {
            tiles[a] = most[a] = all[a];
            pieces[a] = 1;
        }
        for (;;) {
            const int64_t voxels = (2 * most[0] + 2) * (2 * most[1] + 2) * (2 * most[2] + 2);
            const bool done = voxels * voxel_bytes <= kL2Bytes * 2 / 3 && batch * count() >= kTasks;
            if (done || (most[0] == 1 && most[1] == 1)) return;
            const int axis = most[0] >= most[1] ? 0 : 1;
            most[axis] = ceil_divide(most[axis], 2);
            pieces[axis] = ceil_divide(tiles[axis], most[axis]);
        }
    }

    int64_t count() const { return pieces[0] * pieces[1]; }

    FirstLayerSlab slab(int64_t task) const {
        const int64_t piece[3] = {task % count() / pieces[1], task % pieces[1], 0};
        FirstLayerSlab slab = {};
        slab.sample = task / count();
        for (int a = 0; a < 3; ++a) {
            slab.first[a] = piece[a] * most[a];
            slab.count[a] = smaller(most[a], tiles[a] - slab.first[a]);
        }
        return slab;
    }
};

}  // namespace
}  // namespace pvc
