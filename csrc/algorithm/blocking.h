// How a gather is cut into work: units of channels, blocks of target channels, chunks of source channels, tiles of
// voxels.
//
// A unit is a set of channels that are packed and computed together: one group, or (depthwise) a run of channels.
// Packed weights of a unit: [block][chunk][reduction element][block width], a block being at most kMaxBlockVectors
// vectors wide. The reduction of one chunk is cut into parts whose weights stay in L1 while all voxels of a tile pass.
#pragma once

#include "../arena.h"
#include "../microkernel/broadcast.h"
#include "../microkernel/depthwise.h"
#include "tiling.h"

namespace pvc {
namespace {

struct Part {
    int64_t segment, segments;
    int64_t element;  // its first reduction element
};

template <typename T>
struct Blocking {
    static constexpr int64_t lanes = Vector<T>::lanes;

    bool depthwise, flat;
    int64_t units, unit_sources, unit_targets;  // channels of a whole unit
    int64_t vectors, blocks;                    // of target channels in a unit
    int64_t chunk, chunks;                      // of source channels in a unit
    int64_t elements;                           // reduction elements of one chunk
    Tiling tiling;
    Segment* segments;
    Part* parts;
    int64_t part_count;

    int64_t block_first(int64_t block) const { return block * vectors / blocks; }
    int64_t block_vectors(int64_t block) const { return block_first(block + 1) - block_first(block); }
    int64_t unit_weights() const { return chunks * elements * vectors * lanes; }
    int64_t block_weights(int64_t block) const { return chunks * elements * block_first(block) * lanes; }

    int64_t source_channel(int64_t unit) const { return unit * unit_sources; }
    int64_t target_channel(int64_t unit) const { return unit * unit_targets; }
};

// Writes the segments of one chunk, runs cut to at most `longest` elements; returns how many.
template <typename T>
int64_t list_segments(const Gather& gather, const Blocking<T>& blocking, int64_t longest, Segment* segments) {
    const PackedAxis* packed = blocking.tiling.axis;
    const int64_t step_h = packed[1].tap_step * packed[2].rows * blocking.chunk;
    const int64_t step_d = packed[0].tap_step * packed[1].rows * packed[2].rows * blocking.chunk;
    const int64_t step_w = packed[2].tap_step * blocking.chunk;
    const bool joined = packed[2].tap_step == 1 && !blocking.depthwise;  // taps along the width are one run
    const int64_t runs = joined ? 1 : gather.axis[2].taps;
    const int64_t run = blocking.depthwise ? 1 : joined ? gather.axis[2].taps * blocking.chunk : blocking.chunk;
    int64_t count = 0;
    for (int64_t d = 0; d < gather.axis[0].taps; ++d) {
        for (int64_t h = 0; h < gather.axis[1].taps; ++h) {
            for (int64_t w = 0; w < runs; ++w) {
                for (int64_t i = 0; i < run; i += longest, ++count) {
                    const int64_t offset = d * step_d + h * step_h + w * step_w + i;
                    segments[count] = {static_cast<int32_t>(offset), static_cast<int32_t>(smaller(longest, run - i))};
                }
            }
        }
    }
    return count;
}

template <typename T>
Blocking<T> choose_blocking(const Gather& gather) {
    constexpr int64_t lanes = Vector<T>::lanes;
    constexpr int64_t kPackedValues = kL2Bytes / 2 / sizeof(T), kSumValues = kL2Bytes / 8 / sizeof(T);
    constexpr int64_t kPartValues = kL1Bytes * 5 / 8 / sizeof(T), kMaxChunk = 256, kShortRun = 16;
    const int64_t taps = gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps;

    Blocking<T> b = {};
    b.depthwise = gather.groups > 1 && gather.source_channels == 1 && gather.target_channels == 1;
    if (b.depthwise) {
        b.units = ceil_divide(gather.groups, 8 * lanes);
        b.unit_sources = b.unit_targets = ceil_divide(ceil_divide(gather.groups, b.units), lanes) * lanes;
        b.units = ceil_divide(gather.groups, b.unit_sources);
        b.chunks = 1;
        b.chunk = b.unit_sources;
        b.elements = taps;
    } else {
        b.units = gather.groups;
        b.unit_sources = gather.source_channels;
        b.unit_targets = gather.target_channels;
        const int64_t limit = smaller(kMaxChunk, larger(kPackedValues / (2 * larger(taps, 1)), 16));
        b.chunks = ceil_divide(b.unit_sources, limit);
        b.chunk = ceil_divide(b.unit_sources, b.chunks);
        b.elements = taps * b.chunk;
    }
    b.vectors = ceil_divide(b.unit_targets, lanes);
    b.blocks = ceil_divide(b.vectors, kMaxBlockVectors);

    const int64_t block_width = ceil_divide(b.vectors, b.blocks) * lanes;
    const int64_t sums = b.chunks == 1 ? block_width : b.vectors * lanes;
    b.tiling = choose_tiling(gather, kPackedValues / b.chunk, larger(kSumValues / sums, 16), gather.batch * b.units);

    const int64_t part_elements = larger(kPartValues / block_width, 1);
    b.flat = !b.depthwise && (b.tiling.axis[2].tap_step == 1 ? gather.axis[2].taps : 1) * b.chunk < kShortRun;
    const int64_t longest = b.flat ? 1 : part_elements;
    const int64_t most = larger(b.elements, 1);  // a segment has at least one element, a part one segment
    b.segments = static_cast<Segment*>(
        scratch_bytes(Scratch::tables, static_cast<size_t>(most) * (sizeof(Segment) + sizeof(Part))));
    b.parts = reinterpret_cast<Part*>(b.segments + most);
    const int64_t segments = list_segments(gather, b, longest, b.segments);
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
    return b;
}

}  // namespace
}  // namespace pvc
