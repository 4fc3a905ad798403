// Products of two matrices on a matrix unit whose reduction runs over voxels, 32 to a step: the left operand has a row
// of target channels for every tile row, the right one pairs of voxels with 16 columns (microkernel/tile_product.h).
//
// Operands are packed tile by tile, 1 KiB each, aligned: a load never crosses cache lines, wherever a tap shifts the
// right operand to, as long as it shifts it by pairs. The order of products is that with the fewest loads: 14 for 24.
#pragma once

#include "tile_product.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

constexpr int64_t kTile = kTileRows * kTileValues;    // values of an operand's tile
constexpr int64_t kTileSums = kTileRows * kTileRows;  // sums of a tile

// A block of Rows x Columns tiles of sums over `steps` times 32 voxels.
struct VoxelProduct {
    const Bfloat16* left[2];   // of each tile of rows, the first step's tile; the next step's follows
    const Bfloat16* right[2];  // of each tile of columns, what offset 0 means
    int64_t left_part, right_part;
    const int32_t* offsets;  // of the right operand, of each step, in values
    int64_t steps;
    bool first;      // sums start from zero, not from what is in `sums`
    float* sums[2];  // of each tile of rows, a tile of sums for each tile of columns
};

template <typename Unit, int Parts, int Rows, int Columns>
void voxel_product(Unit& unit, const VoxelProduct& p) {
    static_assert(Rows <= 2 && Columns <= 2, "sums are tiles 0 to 3, left operands 4 and 5, right ones 6 and 7");
    alignas(64) static constexpr float kZeros[kTileRows] = {};
    const auto for_sums = [&](auto&& body) {
        body(Number<0>{}, p.sums[0]);
        if constexpr (Columns == 2) body(Number<1>{}, p.sums[0] + kTileSums);
        if constexpr (Rows == 2) body(Number<2>{}, p.sums[1]);
        if constexpr (Rows == 2 && Columns == 2) body(Number<3>{}, p.sums[1] + kTileSums);
    };
    if (p.first) {
        for_sums([&](auto tile, float*) { unit.template load<decltype(tile)::number>(kZeros, 0); });
    } else {
        for_sums([&](auto tile, float* sums) { unit.template load<decltype(tile)::number>(sums, 64); });
    }
    for (int64_t step = 0; step < p.steps; ++step) {
        const auto left = [&](int64_t part) {
            unit.template load<4>(p.left[0] + part * p.left_part + step * kTile, 64);
            if constexpr (Rows == 2) unit.template load<5>(p.left[1] + part * p.left_part + step * kTile, 64);
        };
        const auto right = [&](int64_t part) {
            unit.template load<6>(p.right[0] + part * p.right_part + p.offsets[step], 64);
            if constexpr (Columns == 2) unit.template load<7>(p.right[1] + part * p.right_part + p.offsets[step], 64);
        };
        const auto multiply = [&] {
            unit.template multiply<0, 4, 6>();
            if constexpr (Columns == 2) unit.template multiply<1, 4, 7>();
            if constexpr (Rows == 2) unit.template multiply<2, 5, 6>();
            if constexpr (Rows == 2 && Columns == 2) unit.template multiply<3, 5, 7>();
        };
        right(0);
        if constexpr (Parts == 3) {
            left(2);
            multiply();
        }
        if constexpr (Parts >= 2) {
            left(1);
            multiply();
        }
        if constexpr (Parts == 3) {
            right(1);
            multiply();
        }
        left(0);
        if constexpr (Parts == 3) {
            multiply();
            right(2);
            multiply();
            right(0);
            multiply();
        } else {
            multiply();
            if constexpr (Parts == 2) {
                right(1);
                multiply();
            }
        }
    }
    for_sums([&](auto tile, float* sums) { unit.template store<decltype(tile)::number>(sums, 64); });
}

#endif

}  // namespace
}  // namespace pvc
