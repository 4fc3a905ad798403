// How a Winograd convolution is cut: blocks of target channels, boxes of tiles.
//
// A box is what one task computes: some tiles of one sample whose transformed source, and products of one block of
// channels, stay in the second-level cache.
#pragma once

#include "../arena.h"
#include "../microkernel/panel.h"
#include "sparse_gradient.h"
#include "winograd_transform.h"

namespace pvc {
namespace {

template <typename T>
struct WinogradBlocking {
    static constexpr int64_t lanes = Vector<T>::lanes;

    const WinogradTransforms<T>* transforms;
    int64_t sources, source_width;     // channels, and whole vectors of them
    int64_t targets, vectors, blocks;  // channels, vectors, blocks of at most kPanelVectors vectors
    bool half;                         // the last vector is half of one
    int64_t voxels[3];                 // target voxels to compute
    int64_t tiles[3], box[3], boxes[3];

    int64_t box_tiles() const { return box[0] * box[1] * box[2]; }
    int64_t box_count() const { return boxes[0] * boxes[1] * boxes[2]; }
    int64_t block_first(int64_t block) const { return block * vectors / blocks; }
    int64_t block_vectors(int64_t block) const { return block_first(block + 1) - block_first(block); }
    bool block_half(int64_t block) const { return half && block + 1 == blocks; }
    int64_t block_columns(int64_t block) const {
        return block_vectors(block) * lanes - (block_half(block) ? lanes / 2 : 0);
    }
    int64_t widest_block() const { return ceil_divide(vectors, blocks) * lanes; }
    int64_t block_weights(int64_t block) const { return transforms->count() * sources * block_first(block) * lanes; }

    // Between the points of all tiles of a box: an odd number of cache lines, so that the points of one tile, which a
    // transform visits one after another, do not compete for the same lines of a cache.
    static int64_t point_pitch(int64_t values) {
        constexpr int64_t line = 64 / sizeof(T);
        return (ceil_divide(values, line) | 1) * line;
    }
};

// The box of at most `most` tiles that packs least. Depends on the problem alone.
template <typename T>
void choose_box(WinogradBlocking<T>& b, int64_t most) {
    constexpr double kTileCost = 1.5;  // of a whole tile, in packed tiles
    double best = 0;
    for (int64_t w = 1; w <= smaller(b.tiles[2], most); ++w) {
        for (int64_t h = 1; h <= smaller(b.tiles[1], most / w); ++h) {
            const int64_t size[3] = {smaller(b.tiles[0], most / w / h), h, w};
            double cost = 1, packed = 1;
            int64_t even[3];
            for (int a = 0; a < 3; ++a) {
                const int outputs = b.transforms->outputs[a];
                even[a] = even_part(b.tiles[a], size[a]);
                packed *= static_cast<double>(even[a] * outputs + b.transforms->points[a] - outputs) / outputs;
                cost *= static_cast<double>(ceil_divide(b.tiles[a], even[a]));
            }
            const double tiles = static_cast<double>(even[0] * even[1] * even[2]);
            // A few tiles alone leave register tiles unused and read all weights for little.
            cost *= packed + kTileCost * (tiles + 4);
            if (best == 0 || cost < best) {
                best = cost;
                for (int a = 0; a < 3; ++a) b.box[a] = even[a];
            }
        }
    }
    for (int a = 0; a < 3; ++a) b.boxes[a] = ceil_divide(b.tiles[a], b.box[a]);
}

template <typename T>
WinogradBlocking<T> choose_winograd(const Gather& gather, const WinogradTransforms<T>& transforms) {
    constexpr int64_t lanes = Vector<T>::lanes, kTasks = 16, kFewestTiles = 8, kManyTiles = 24;
    WinogradBlocking<T> b = {};
    b.transforms = &transforms;
    b.sources = gather.source_channels;
    b.source_width = ceil_divide(b.sources, lanes) * lanes;
    b.targets = gather.target_channels;
    b.vectors = ceil_divide(b.targets, lanes);
    b.half = kHalfVectors && b.vectors * lanes - b.targets >= lanes / 2;
    b.blocks = ceil_divide(b.vectors, int64_t{kPanelVectors});
    int64_t tiles = gather.batch;
    for (int a = 0; a < 3; ++a) {
        const CellAxis cells = gather.cells(a);
        b.voxels[a] = (cells.count - 1) * cells.step + cells.extent;
        b.tiles[a] = ceil_divide(b.voxels[a], int64_t{transforms.outputs[a]});
        tiles *= b.tiles[a];
    }
    const int64_t tile_bytes =
        transforms.count() * (b.source_width + b.widest_block()) * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = larger(kL2Bytes * 2 / 3 / tile_bytes, kManyTiles);
    choose_box(b, larger(smaller(fitting, ceil_divide(tiles, kTasks)), kFewestTiles));
    return b;
}

}  // namespace
}  // namespace pvc
