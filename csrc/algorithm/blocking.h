// How a gather is cut into work: units of channels, blocks of target channels, chunks of source channels, tiles of
// voxels.
//
// A unit is a set of channels that are packed and computed together: one group, or (depthwise) a run of channels.
// Packed weights of a unit: [block][chunk][reduction element][block width]. The reduction of one chunk is cut into
// parts whose weights stay in L1 while all voxels of a tile pass.
//
// Three kernels share this. Lanes are target channels in two of them and voxels along the width in the third; which one
// runs is decided by the share of lanes that would do useful work, with some allowance for transposing tiles when the
// kernel's order is not that of the layout.
#pragma once

#include "../arena.h"
#include "../cache.h"
#include "../microkernel/broadcast.h"
#include "../microkernel/depthwise.h"
#include "../microkernel/planar.h"
#include "tiling.h"

namespace pvc {
namespace {

enum class Kernel { broadcast, depthwise, planar };

struct Part {
    int64_t segment, segments;
    int64_t element;  // its first reduction element
};

template <typename T>
struct Blocking {
    static constexpr int64_t lanes = Vector<T>::lanes;

    Kernel kernel;
    int64_t length;                             // of every segment, or 0 where lengths differ
    bool slabs;                                 // sums are needed for one row of cells at a time, not for a whole tile
    int64_t units, unit_sources, unit_targets;  // channels of a whole unit
    int64_t grain;                              // target channels per accumulator: lanes, or 1 for planar
    int64_t grains, blocks;                     // of target channels in a unit
    int64_t chunk, chunks;                      // of source channels in a unit
    int64_t elements;                           // reduction elements of one chunk
    Tiling tiling;
    Segment* segments;
    Part* parts;
    int64_t part_count;

    int64_t block_first(int64_t block) const { return block * grains / blocks; }
    int64_t block_grains(int64_t block) const { return block_first(block + 1) - block_first(block); }
    int64_t unit_width() const { return grains * grain; }
    int64_t unit_weights() const { return chunks * elements * unit_width(); }
    int64_t block_weights(int64_t block) const { return chunks * elements * block_first(block) * grain; }

    // Scratch memory holds the source as [voxel][channel], or for planar as [channel][voxel].
    int64_t voxel_stride() const { return kernel == Kernel::planar ? 1 : chunk; }
    int64_t axis_stride(int axis) const {
        int64_t stride = voxel_stride();
        for (int inner = axis + 1; inner < 3; ++inner) stride *= tiling.axis[inner].rows;
        return stride;
    }
    int64_t item_voxels() const { return kernel == Kernel::planar ? lanes : 1; }
    int64_t items(const int64_t count[3]) const { return count[0] * count[1] * ceil_divide(count[2], item_voxels()); }
    int64_t full_tile(int64_t block_grains) const {
        if (kernel == Kernel::planar) return planar_vectors(block_grains);
        return kernel == Kernel::depthwise ? kDepthwiseVoxels : broadcast_voxels(block_grains);
    }
};

// The allowances are measured: in ncdhw, transposing tiles costs less than the planar kernel's unaligned loads and row
// ends unless there are too few channels to transpose by vectors; in ndhwc the planar kernel has to transpose.
template <typename T>
Kernel choose_kernel(const Gather& gather) {
    if constexpr (is_pair<T>) return Kernel::broadcast;
    constexpr int64_t lanes = Vector<T>::lanes;
    const auto used = [](int64_t count) {
        return static_cast<double>(count) / static_cast<double>(ceil_divide(count, lanes) * lanes);
    };
    const bool depthwise = gather.groups > 1 && gather.source_channels == 1 && gather.target_channels == 1;
    const double channels = used(depthwise ? gather.groups : gather.target_channels);
    // One channel is in both orders, and of pooled results there are few to transpose.
    const bool pooled_single = gather.window[0].extent != 0 && gather.source_channels == 1;
    const bool few_channels = gather.source_channels < lanes && !pooled_single;
    const double allowance = gather.layout == Layout::ndhwc ? 0.6 : few_channels ? 2.0 : 0.85;
    if (allowance * used(gather.axis[2].count) > channels) return Kernel::planar;
    return depthwise ? Kernel::depthwise : Kernel::broadcast;
}

// Writes the segments of one chunk, runs cut to at most `longest` elements; returns how many.
template <typename T>
int64_t list_segments(const Gather& gather, const Blocking<T>& b, int64_t longest, Segment* segments) {
    int64_t step[3];
    for (int axis = 0; axis < 3; ++axis) step[axis] = b.tiling.axis[axis].tap_step * b.axis_stride(axis);
    const bool planar = b.kernel == Kernel::planar;
    const bool joined =
        b.kernel == Kernel::broadcast && b.tiling.axis[2].tap_step == 1;  // taps along the width: one run
    const int64_t planes = planar ? b.chunk : 1, runs = joined ? 1 : gather.axis[2].taps;
    const int64_t run = b.kernel != Kernel::broadcast ? 1 : joined ? gather.axis[2].taps * b.chunk : b.chunk;
    int64_t count = 0;
    for (int64_t plane = 0; plane < planes; ++plane) {
        for (int64_t d = 0; d < gather.axis[0].taps; ++d) {
            for (int64_t h = 0; h < gather.axis[1].taps; ++h) {
                for (int64_t w = 0; w < runs; ++w) {
                    const int64_t tap = plane * b.tiling.packed_voxels() + d * step[0] + h * step[1] + w * step[2];
                    for (int64_t i = 0; i < run; i += longest, ++count) {
                        segments[count] = {static_cast<int32_t>(tap + i),
                                           static_cast<int32_t>(smaller(longest, run - i))};
                    }
                }
            }
        }
    }
    return count;
}

// Groups segments into parts of at most `part_elements` elements.
template <typename T>
void list_parts(Blocking<T>& b, int64_t segments, int64_t part_elements) {
    b.parts[0] = {0, 0, 0};
    b.part_count = 1;
    int64_t element = 0;
    for (int64_t s = 0; s < segments; ++s) {
        Part* part = &b.parts[b.part_count - 1];
        if (part->segments > 0 && element + b.segments[s].length - part->element > part_elements) {
            part = &b.parts[b.part_count++];
            *part = {s, 0, element};
        }
        ++part->segments;
        element += b.segments[s].length;
    }
}

// Values of a tile's packed source, and of its sums, unless weights are many.
template <typename T>
constexpr int64_t kTileBufferValues = kL2Bytes / 2 / static_cast<int64_t>(sizeof(T));

struct TileRoom {  // the same, and `TileLimits::few`
    int64_t values, few;
};

// Every tile reads all weights. Where those are more than a core's cache holds, reading one takes as long as some 40 of
// its products do: tiles as large as the cache allows, and where there are `others` to share out, small ones stay
// whole.
template <typename T>
TileRoom tile_room(int64_t weight_bytes, int64_t others) {
    constexpr int64_t kManyOthers = 8;
    if (weight_bytes <= larger(l2_bytes(), kL2Bytes)) return {kTileBufferValues<T>, kFewVoxels};
    const int64_t spare = (l2_bytes() - kL2Bytes) / 2 / static_cast<int64_t>(sizeof(T));
    return {larger(kTileBufferValues<T>, spare), others >= kManyOthers ? 2 * kFewVoxels : kFewVoxels};
}

template <typename T>
Blocking<T> choose_blocking(const Gather& gather) {
    constexpr int64_t lanes = Vector<T>::lanes;
    constexpr int64_t kPartBytes = kL1Bytes * 5 / 8, kMaxChunk = 256, kShortRun = 16, kDepthwiseUnit = 8 * lanes;
    const int64_t taps = gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps;

    Blocking<T> b = {};
    b.kernel = choose_kernel<T>(gather);
    int64_t most_grains = kBroadcastVectors;
    if (b.kernel == Kernel::depthwise) {
        most_grains = kDepthwiseVectors;
        const int64_t even = ceil_divide(gather.groups, ceil_divide(gather.groups, kDepthwiseUnit));
        b.unit_sources = b.unit_targets = ceil_divide(even, lanes) * lanes;
        b.units = ceil_divide(gather.groups, b.unit_sources);
        b.chunks = 1;
        b.chunk = b.unit_sources;
        b.elements = taps;
    } else {
        if (b.kernel == Kernel::planar) most_grains = kPlanarChannels;
        b.units = gather.groups;
        b.unit_sources = gather.source_channels;
        b.unit_targets = gather.target_channels;
        const int64_t limit = smaller(kMaxChunk, larger(kTileBufferValues<T> / (2 * larger(taps, 1)), 16));
        b.chunks = ceil_divide(b.unit_sources, limit);
        b.chunk = ceil_divide(b.unit_sources, b.chunks);
        b.elements = taps * b.chunk;
    }
    b.grain = b.kernel == Kernel::planar ? 1 : lanes;
    b.grains = ceil_divide(b.unit_targets, b.grain);
    b.blocks = ceil_divide(b.grains, most_grains);

    const int64_t block_width = ceil_divide(b.grains, b.blocks) * b.grain;
    const int64_t waiting = b.chunks == 1 ? block_width : b.unit_width();  // sums kept per voxel
    const CellAxis depths = gather.cells(0);
    b.slabs = gather.window[0].extent != 0 && b.chunks == 1 && depths.step >= depths.extent;
    const TileRoom room = tile_room<T>(b.unit_weights() * static_cast<int64_t>(sizeof(T)), gather.batch * b.units);
    const int64_t voxels = b.slabs ? INT32_MAX : larger(room.values / waiting, 16);
    TileLimits limits = {room.values / b.chunk, voxels, gather.batch * b.units, b.item_voxels()};
    limits.few = room.few;
    b.tiling = choose_tiling(gather, limits);

    const int64_t run = (b.tiling.axis[2].tap_step == 1 ? gather.axis[2].taps : 1) * b.chunk;
    if (b.kernel != Kernel::broadcast || run < kShortRun)
        b.length = run % 3 == 0 && b.kernel == Kernel::broadcast ? 3 : 1;
    const int64_t element_bytes =
        block_width * static_cast<int64_t>(sizeof(T) + (b.length > 0 ? sizeof(Segment) / b.grain : 0));
    const int64_t part_elements = larger(kPartBytes / element_bytes, 1);
    const int64_t most = larger(b.elements, 1);  // a segment has at least one element, a part one segment
    b.segments = static_cast<Segment*>(
        scratch_bytes(Scratch::tables, static_cast<size_t>(most) * (sizeof(Segment) + sizeof(Part))));
    b.parts = reinterpret_cast<Part*>(b.segments + most);
    list_parts(b, list_segments(gather, b, b.length > 0 ? b.length : part_elements, b.segments), part_elements);
    return b;
}

}  // namespace
}  // namespace pvc
