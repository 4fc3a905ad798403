// What one task of a split gather computes, and the products of all its rows with one block of weights.
#pragma once

#include "split_plan.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// The voxels and blocks of target channels of one task. Along a transformed axis a tile has two voxels.
struct SplitPlace {
    int64_t sample, samples, first_block, blocks;
    int64_t first[3], count[3];  // voxels of the gather
    int64_t tiles[3];

    SplitPlace(const Gather& gather, const SplitPlan& plan, int64_t task) {
        const Tiling& tiling = plan.tiling;
        const int64_t tile = task % tiling.count(), groups = ceil_divide(plan.blocks, plan.blocks_a_task);
        first_block = task / tiling.count() % groups * plan.blocks_a_task;
        blocks = smaller(plan.blocks_a_task, plan.blocks - first_block);
        sample = task / tiling.count() / groups * plan.samples;
        samples = smaller(plan.samples, gather.batch - sample);
        const int64_t index[3] = {tile / tiling.tiles[2] / tiling.tiles[1], tile / tiling.tiles[2] % tiling.tiles[1],
                                  tile % tiling.tiles[2]};
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t outputs = tiling.axis[axis].tile * plan.outputs(axis);
            first[axis] = index[axis] * outputs;
            count[axis] = smaller(outputs, gather.axis[axis].count - first[axis]);
            tiles[axis] = ceil_divide(count[axis], plan.outputs(axis));
        }
    }

    SourceBlock source(const Gather& gather, const SplitPlan& plan) const {
        SourceBlock block = {};
        block.sample = sample;
        block.width = plan.chunk;
        for (int axis = 0; axis < 3; ++axis) {
            block.origin[axis] = gather.axis[axis].source_start + first[axis] * gather.axis[axis].source_step;
        }
        return block;
    }
};

template <typename Unit, int Parts>
class SplitPanels {
  public:
    SplitPanels(const SplitPlan& plan, const SplitPlace& place) : plan_(plan), place_(place) {
        rows_ = scratch<int32_t>(Scratch::tile_lists, plan.sums_rows() / kTileRows);
        list_rows();
    }

    int64_t heights() const { return plan_.flat ? 1 : place_.tiles[1]; }
    int64_t panel_tiles() const { return ceil_divide(plan_.panel_rows(place_.tiles[1], place_.tiles[2]), kTileRows); }
    int64_t panels() const { return place_.samples * place_.tiles[0] * heights(); }

    // `steps` and `offsets` say where in `source`, one point's, the products of a row are. `initial`: what the sums of
    // every row start from, or null where they go on.
    void multiply(int64_t steps, const int32_t* offsets, int64_t columns, const Bfloat16* source,
                  const Bfloat16* weights, const float* initial, float* sums) {
        TileProduct product = {};
        product.left_part = plan_.part_values();
        product.left_row = plan_.tiling.axis[2].voxel_step * plan_.chunk * static_cast<int64_t>(sizeof(Bfloat16));
        product.offsets = offsets;
        product.steps = steps;
        product.right = weights;
        product.sums_row = SplitPlan::kColumns * static_cast<int64_t>(sizeof(float));
        const int64_t tiles = panels() * panel_tiles();
        for (int64_t tile = 0; tile < tiles;) {
            const int64_t now = smaller(tiles - tile, 2);
            for (int64_t i = 0; i < now; ++i) product.left[i] = source + rows_[tile + i];
            product.sums = sums + tile * kTileRows * SplitPlan::kColumns;
            product.initial = initial != nullptr ? initial : product.sums;
            product.initial_row = initial != nullptr ? 0 : product.sums_row;
            if (columns == kTileRows) {
                now == 1 ? tile_product<Unit, Parts, 1, 1>(unit_, product)
                         : tile_product<Unit, Parts, 2, 1>(unit_, product);
            } else {
                now == 1 ? tile_product<Unit, Parts, 1, 2>(unit_, product)
                         : tile_product<Unit, Parts, 2, 2>(unit_, product);
            }
            tile += now;
        }
    }

    // Calls body(sample, depth, height, sums) for each row of tiles, with the sums of its first voxel.
    template <typename Body>
    void for_each_row(const float* sums, const Body& body) const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t plane = panel / heights(), row = panel % heights();
            for (int64_t h = 0; h < (plan_.flat ? place_.tiles[1] : 1); ++h) {
                body(place_.sample + plane / place_.tiles[0], plane % place_.tiles[0], row + h,
                     sums + h * plan_.pitch * SplitPlan::kColumns);
            }
            sums += panel_tiles() * kTileRows * SplitPlan::kColumns;
        }
    }

  private:
    // Where in a point's source each tile of rows begins.
    void list_rows() {
        const PackedAxis* packed = plan_.tiling.axis;
        int32_t* row = rows_;
        for (int64_t sample = 0; sample < place_.samples; ++sample) {
            for (int64_t d = 0; d < place_.tiles[0]; ++d) {
                for (int64_t h = 0; h < heights(); ++h) {
                    const int64_t panel = sample * plan_.sample_values() +
                                          d * packed[0].voxel_step * plan_.row_values(0) +
                                          h * packed[1].voxel_step * plan_.row_values(1);
                    for (int64_t i = 0; i < panel_tiles(); ++i) {
                        *row++ = static_cast<int32_t>(panel + i * kTileRows * packed[2].voxel_step * plan_.chunk);
                    }
                }
            }
        }
    }

    const SplitPlan& plan_;
    const SplitPlace& place_;
    Unit unit_;
    int32_t* rows_;
};

#endif

}  // namespace
}  // namespace pvc
