// How a Winograd convolution is cut: blocks of target channels, boxes of tiles.
//
// A box is what one task computes: some tiles of one sample whose transformed source, and products of one block of
// channels, stay in the second-level cache.
//
// With a dilation, target voxels that are `lattice` apart share source voxels, and others do not: each residue modulo
// the lattice is a dense convolution of its own, on every `lattice`-th voxel. A box has tiles of one residue per axis;
// all residues are cut as the first, the largest.
#pragma once

#include "../arena.h"
#include "../cache.h"
#include "../microkernel/panel.h"
#include "sparse_gradient.h"
#include "winograd_transform.h"

namespace pvc {
namespace {

template <typename T>
struct WinogradBlocking {
    static constexpr int64_t lanes = Vector<T>::lanes, most_vectors = 4;

    const WinogradScheme<T>* scheme;
    int64_t sources, source_vectors;  // channels, and vectors of them
    int64_t targets, vectors;
    bool half_target;        // the last vector is half of one
    int64_t panel_vectors;   // of a whole panel (panel.h)
    bool pairs;              // panels of one vector and a half take two source channels at once
    int64_t blocks;          // of at most `most_vectors` vectors, whole panels but the last
    int64_t batch, samples;  // of a box
    int64_t voxels[3];       // target voxels to compute
    int64_t lattice[3], residues[3];
    int64_t tiles[3], box[3], boxes[3];  // of a residue

    // Boxes of a sample, or of as many as a box takes.
    int64_t box_count() const { return boxes[0] * boxes[1] * boxes[2] * residues[0] * residues[1] * residues[2]; }
    int64_t all_boxes() const { return ceil_divide(batch, samples) * box_count(); }
    int64_t block_first(int64_t block) const { return block * most_vectors; }
    int64_t block_vectors(int64_t block) const { return smaller(most_vectors, vectors - block_first(block)); }
    int64_t widest_block() const { return block_vectors(0) * lanes; }

    // Of a vector of target channels.
    bool half(int64_t vector) const { return half_target && vector + 1 == vectors; }

    // Of the panel that begins with a vector.
    int64_t panel_size(int64_t vector) const { return smaller(panel_vectors, vectors - vector); }
    bool panel_half(int64_t vector) const { return half(vector + panel_size(vector) - 1); }
    bool panel_paired(int64_t vector) const { return pairs && panel_size(vector) == 2 && panel_half(vector); }
    int64_t panel_columns(int64_t vector) const {
        return panel_size(vector) * lanes - (panel_half(vector) ? lanes / 2 : 0);
    }
    int64_t panel_weights(int64_t vector) const { return scheme->weight_count() * sources * vector * lanes; }

    // Voxels of a residue of the source under `tiles` tiles.
    int64_t source_voxels(int a, int64_t tiles) const {
        return (tiles - 1) * scheme->shape[a].advance + scheme->shape[a].window;
    }

    // Transformed planes and products of a box.
    int64_t source_values(const int64_t box[3]) const {
        const int* axis = scheme->axis;
        return source_voxels(axis[0], box[axis[0]]) * box[axis[1]] * box[axis[2]] * source_vectors *
               scheme->tile_pitch();
    }
    int64_t product_pitch(const int64_t box[3]) const {
        return odd_lines<T>(box[0] * box[1] * box[2] * scheme->outputs[scheme->outer()] * widest_block());
    }
    int64_t box_bytes(const int64_t box[3]) const {
        return (source_values(box) + scheme->plane_points() * product_pitch(box)) * static_cast<int64_t>(sizeof(T));
    }
};

constexpr int64_t kMostTiles = 96;

struct BoxLimits {
    int64_t boxes = 16;  // at least so many, unless each would have few tiles
    int64_t bytes = kL2Bytes;
    double box_cost = 4;  // in tiles: a few alone leave register tiles unused and read all weights for little
};

// Every box reads all weights: boxes as large as a core's own cache allows, with room left for what streams past. Where
// the weights come from beyond that cache they are more than the box's source, which is better read from there too,
// once for each block of target channels.
inline BoxLimits limits_of_machine(int64_t weight_bytes) {
    BoxLimits limits;
    limits.bytes = larger(kL2Bytes, l2_bytes() - kL2Bytes);
    if (weight_bytes > larger(kL2Bytes, l2_bytes())) {
        limits.bytes = larger(limits.bytes, 4 * l2_bytes());
        limits.box_cost = 16;
    }
    return limits;
}

// The box that costs least of those that fit.
template <typename T>
void choose_box(const Gather& gather, const BoxLimits& limits, WinogradBlocking<T>& b) {
    constexpr int64_t kFewestTiles = 8;
    // A transformed plane, a packed voxel under a tile, a row of tiles: long rows are read and stored faster, most of
    // all where they have to be transposed.
    const bool last = gather.layout == Layout::ndhwc;
    const double plane_cost = 0.08, packed_cost = last ? 0.03 : 0.1, row_cost = last ? 0.2 : 1;
    const WinogradScheme<T>& scheme = *b.scheme;
    const int* axis = scheme.axis;
    const int64_t residues = b.residues[0] * b.residues[1] * b.residues[2];
    const int64_t tiles = gather.batch * residues * b.tiles[0] * b.tiles[1] * b.tiles[2];
    const int64_t most = larger(smaller(kMostTiles, ceil_divide(tiles, limits.boxes)), kFewestTiles);
    double best = 0;
    for (int64_t w = 1; w <= smaller(b.tiles[2], most); ++w) {
        for (int64_t h = 1; h <= smaller(b.tiles[1], most / w); ++h) {
            for (int64_t d = 1; d <= smaller(b.tiles[0], most / w / h); ++d) {
                const int64_t size[3] = {even_part(b.tiles[0], d), even_part(b.tiles[1], h), even_part(b.tiles[2], w)};
                if (size[0] != d || size[1] != h || size[2] != w) continue;
                const int64_t count = d * h * w;
                if (count > kFewestTiles && b.box_bytes(size) > limits.bytes) continue;
                double packed = 1, boxes = 1;
                for (int a = 0; a < 3; ++a) {
                    packed *= static_cast<double>(b.source_voxels(a, size[a])) / scheme.outputs[a];
                    boxes *= static_cast<double>(ceil_divide(b.tiles[a], size[a]));
                }
                const double planes = static_cast<double>(b.source_voxels(axis[0], size[axis[0]]) * count) /
                                      static_cast<double>(size[axis[0]] * scheme.outputs[axis[0]]);
                const double rows = static_cast<double>(count / size[axis[2]]);
                const double cost = boxes * (static_cast<double>(count) + limits.box_cost + plane_cost * planes +
                                             packed_cost * packed + row_cost * rows);
                if (best == 0 || cost < best) {
                    best = cost;
                    for (int a = 0; a < 3; ++a) b.box[a] = size[a];
                }
            }
        }
    }
    for (int a = 0; a < 3; ++a) b.boxes[a] = ceil_divide(b.tiles[a], b.box[a]);
}

template <typename T>
WinogradBlocking<T> choose_winograd(const Gather& gather, const WinogradScheme<T>& scheme, const BoxLimits& limits) {
    WinogradBlocking<T> b = {};
    b.scheme = &scheme;
    b.batch = gather.batch;
    b.samples = 1;
    b.sources = gather.source_channels;
    b.source_vectors = ceil_divide(b.sources, b.lanes);
    b.targets = gather.target_channels;
    b.vectors = ceil_divide(b.targets, b.lanes);
    b.half_target = fills_half<T>(b.targets);
    b.panel_vectors = scheme.panel_vectors;
    const AxisShape& outer = scheme.shape[scheme.outer()];
    // A larger first-level cache than 32 KiB comes with units that execute a vector of 64 bytes as fast as half of one.
    b.pairs = has_paired_panels(outer.outputs) && outer.stride == 1 && b.sources % 2 == 0 && l1_bytes() > kL1Bytes;
    b.blocks = ceil_divide(b.vectors, b.most_vectors);
    for (int a = 0; a < 3; ++a) {
        const CellAxis cells = gather.cells(a);
        b.voxels[a] = (cells.count - 1) * cells.step + cells.extent;
        b.lattice[a] = gather.axis[a].tap_step;
        b.residues[a] = smaller(b.lattice[a], b.voxels[a]);
        b.tiles[a] = ceil_divide(ceil_divide(b.voxels[a], b.lattice[a]), int64_t{scheme.outputs[a]});
    }
    choose_box(gather, limits, b);
    return b;
}

template <typename T>
WinogradBlocking<T> choose_winograd(const Gather& gather, const WinogradScheme<T>& scheme) {
    const int64_t weights = scheme.weight_count() * gather.source_channels * gather.target_channels;
    return choose_winograd(gather, scheme, limits_of_machine(weights * static_cast<int64_t>(sizeof(T))));
}

}  // namespace
}  // namespace pvc
