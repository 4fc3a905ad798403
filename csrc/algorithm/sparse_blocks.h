// How the sparse weight gradient cuts the pooled voxels of one sample: tiles of blocks.
//
// A block is what is summed at once. The window of the source under it is packed for one slice of channels, and then
// read by every output channel, whose sums pass through memory once per block: the more voxels a block has, the better,
// as long as its window is a small part of L2, or fits an L1 of 48 KiB and more. (Windows that fit 32 KiB are too
// small: measured 10 % slower.) A tile groups blocks whose source is touched in whole rows first: copied, if its layout
// is ncdhw, with the channels innermost, else only read.
#pragma once

#include "../cache.h"
#include "sparse_gradient.h"

namespace pvc {
namespace {

struct PooledBlocks {
    Tiling tiling;       // of tiles
    PackedAxis axis[3];  // of a block
    int64_t size[3];     // cells of a block
    int64_t blocks[3];   // of a tile
    bool staged;

    PooledBlocks(const Gather& gather, int64_t channels, int64_t slice, int64_t out_channels, bool planar,
                 size_t value_bytes) {
        const auto bytes = static_cast<int64_t>(value_bytes);
        tiling = choose_tiling(gather, {kL2Bytes / 2 / bytes / channels, INT32_MAX, INT32_MAX, 1, true});
        staged = planar && tiling.axis[0].dense && tiling.axis[1].dense && tiling.axis[2].dense;
        choose_block(gather, slice * bytes, out_channels);
        for (int a = 0; a < 3; ++a) blocks[a] = ceil_divide(tiling.cells[a], size[a]);
    }

    int64_t per_tile() const { return blocks[0] * blocks[1] * blocks[2]; }
    int64_t count() const { return tiling.count() * per_tile(); }  // of a sample
    int64_t cells() const { return size[0] * size[1] * size[2]; }
    int64_t packed_voxels() const { return axis[0].rows * axis[1].rows * axis[2].rows; }

    // What packing a block from a staged tile gathers from.
    Gather gather_staged(const Gather& gather, int64_t channels) const {
        Gather from = gather;
        from.groups = 1;
        from.source_channels = channels;
        from.layout = from.source_layout = Layout::ndhwc;
        for (int a = 0; a < 3; ++a) from.axis[a].source_size = tiling.axis[a].rows;
        return from;
    }

  private:
    static PackedAxis pack_cells(const Gather& gather, int a, int64_t cells) {
        return pack_axis(gather.axis[a], (cells - 1) * gather.window[a].step + gather.window[a].extent, false);
    }

    // The block that takes the fewest cycles per tile: per block, packing its window and passing the sums of its output
    // channels through memory; more per multiplication for a window that L2 may not hold.
    void choose_block(const Gather& gather, int64_t voxel_bytes, int64_t out_channels) {
        constexpr double kLine = 64, kPack = 2, kRow = 16, kSums = 4;
        const bool in_l1 = l1_bytes() > kL1Bytes;
        const int64_t window_bytes = in_l1 ? l1_bytes() : kL2Bytes * 3 / 16;
        const double too_large = in_l1 ? 4 : 0.5;
        const double vectors =
            static_cast<double>(gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps * voxel_bytes) / kLine;
        const double sums = static_cast<double>(out_channels) * vectors;
        const double cells = static_cast<double>(tiling.cells[0] * tiling.cells[1] * tiling.cells[2]);
        double best = -1;
        int64_t pieces[3];
        const auto next = [&](int a) {  // more pieces that make smaller parts
            const int64_t part = ceil_divide(tiling.cells[a], pieces[a]);
            pieces[a] = part == 1 ? tiling.cells[a] + 1 : ceil_divide(tiling.cells[a], part - 1);
        };
        for (pieces[0] = 1; pieces[0] <= tiling.cells[0]; next(0)) {
            for (pieces[1] = 1; pieces[1] <= tiling.cells[1]; next(1)) {
                for (pieces[2] = 1; pieces[2] <= tiling.cells[2]; next(2)) {
                    PackedAxis packed[3];
                    double bytes = static_cast<double>(voxel_bytes);
                    for (int a = 0; a < 3; ++a) {
                        packed[a] = pack_cells(gather, a, ceil_divide(tiling.cells[a], pieces[a]));
                        bytes *= static_cast<double>(packed[a].rows);
                    }
                    const double rows = static_cast<double>(packed[0].rows * packed[1].rows);
                    double cost = static_cast<double>(pieces[0] * pieces[1] * pieces[2]) *
                                  (kPack * bytes / kLine + kRow * rows + kSums * sums);
                    if (bytes > static_cast<double>(window_bytes)) cost += too_large * cells * sums;
                    if (best >= 0 && cost >= best) continue;
                    best = cost;
                    for (int a = 0; a < 3; ++a) {
                        axis[a] = packed[a];
                        size[a] = ceil_divide(tiling.cells[a], pieces[a]);
                    }
                }
            }
        }
    }
};

// Block `index` of a tile: its windows, counted over the sample, and the position of its first voxel and tap relative
// to that of the tile. At the end of the sample a tile may have fewer blocks.
struct PooledBlock {
    int64_t cell[3], count[3], origin[3];

    PooledBlock(const Gather& gather, const PooledBlocks& blocks, const PooledTile& tile, int64_t index) {
        for (int a = 2; a >= 0; --a) {
            const int64_t first = index % blocks.blocks[a] * blocks.size[a];
            index /= blocks.blocks[a];
            cell[a] = tile.cell[a] + first;
            count[a] = smaller(blocks.size[a], tile.count[a] - first);
            origin[a] = first * gather.window[a].step * gather.axis[a].source_step;
        }
    }

    bool empty() const { return count[0] <= 0 || count[1] <= 0 || count[2] <= 0; }
};

}  // namespace
}  // namespace pvc
