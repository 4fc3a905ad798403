// Depthwise convolution in ndhwc without packing: tile after tile of microkernel/depthwise_rows.h over the tensors
// themselves.
//
// A task is a block of rows through several planes of one sample; the source planes under a block stay in L2, so memory
// is read about once. Inside a plane, all channels of a tile come before the next tile: what a tile reads of one vector
// of channels lies in lines next to those of the next vector. The last vector of channels ends with the channels and
// computes some of them again.
#pragma once

#include "../arena.h"
#include "../microkernel/depthwise_rows.h"
#include "../parallel.h"
#include "pack_weight.h"

namespace pvc {
namespace {

template <typename T>
bool is_depthwise(const Gather& gather) {
    return gather.layout == Layout::ndhwc && gather.source_channels == 1 && gather.target_channels == 1 &&
           gather.groups >= Vector<T>::lanes;
}

// Whether neighbouring voxels and taps are neighbours in the source, in a kernel that there are tiles for.
inline bool walks_rows(const Gather& gather) {
    const GatherAxis* axis = gather.axis;
    const auto unit = [](const GatherAxis& a) { return a.source_step == 1 && (a.tap_step == 1 || a.taps == 1); };
    return unit(axis[1]) && unit(axis[2]) && axis[0].taps > 0 && axis[1].taps > 0 &&
           (axis[2].taps == 3 || axis[2].taps == 5);
}

// The walk over the tiles of one gather, for any of the three kernels.
template <typename T>
struct DepthwiseWalk {
    static constexpr int64_t lanes = Vector<T>::lanes;

    const Gather& gather;
    const DepthwisePass pass;
    const int64_t voxels[2];  // of a sample: source, target
    const int64_t blocks;     // vectors of channels
    const int64_t taps;
    const int64_t row_tile;
    const EvenCut widths;
    EvenCut heights, depths;  // blocks of rows, runs of planes
    DepthwiseTile<T> tile = {};

    DepthwiseWalk(const Gather& gather, DepthwisePass pass)
        : gather(gather),
          pass(pass),
          voxels{gather.axis[0].source_size * gather.axis[1].source_size * gather.axis[2].source_size,
                 gather.axis[0].target_size * gather.axis[1].target_size * gather.axis[2].target_size},
          blocks(ceil_divide(gather.groups, lanes)),
          taps(gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps),
          row_tile(pass == DepthwisePass::strided ? 1 : 2),
          widths(gather.axis[2].count, kDepthwiseRun),
          heights(gather.axis[1].count, 1),
          depths(gather.axis[0].count, 1) {
        const GatherAxis* axis = gather.axis;
        constexpr int64_t kTasks = 16, kLeastDepth = 4;
        const int64_t row_bytes = axis[2].source_size * gather.groups * static_cast<int64_t>(sizeof(T));
        const int64_t rows = kL2Bytes / 4 / (larger(axis[0].taps, 1) * row_bytes) - axis[1].taps;
        heights = EvenCut(axis[1].count, larger(rows / larger(axis[1].source_step, 1), 4));
        const int64_t wanted = ceil_divide(kTasks, gather.batch * heights.parts);
        depths = EvenCut(axis[0].count, larger(axis[0].count / wanted, smaller(kLeastDepth, axis[0].count)));
        for (int a = 0; a < 3; ++a) {
            tile.size[a] = axis[a].source_size;
            tile.source_step[a] = axis[a].source_step;
            tile.taps[a] = axis[a].taps;
            tile.tap_step[a] = axis[a].tap_step;
        }
        tile.source_stride[2] = gather.groups;
        tile.source_stride[1] = tile.source_stride[2] * axis[2].source_size;
        tile.source_stride[0] = tile.source_stride[1] * axis[1].source_size;
        tile.target_stride[2] = gather.groups * axis[2].target_step;
        tile.target_stride[1] = gather.groups * axis[2].target_size * axis[1].target_step;
        tile.target_stride[0] = gather.groups * axis[2].target_size * axis[1].target_size * axis[0].target_step;
    }

    int64_t tasks() const { return gather.batch * heights.parts * depths.parts; }

    int64_t first_channel(int64_t block) const { return smaller(block * lanes, gather.groups - lanes); }

    // The walk of one task; body(tile, block, kernel) once for every tile and vector of channels.
    template <typename Body>
    void run(int64_t task, const T* source, T* target, const Body& body) const {
        const GatherAxis* axis = gather.axis;
        const int64_t rows = task % heights.parts, planes = task / heights.parts % depths.parts;
        const int64_t sample = task / heights.parts / depths.parts;
        DepthwiseTile<T> now = tile;
        const T* from = source + sample * voxels[0] * gather.groups;
        T* to = target + sample * voxels[1] * gather.groups +
                ((axis[0].target_first * axis[1].target_size + axis[1].target_first) * axis[2].target_size +
                 axis[2].target_first) *
                    gather.groups;
        const DepthwiseKernel<T> kernels[2] = {depthwise_kernel<T>(pass, axis[2].taps, widths.low),
                                               depthwise_kernel<T>(pass, axis[2].taps, widths.low + 1)};
        for (int64_t d = depths.start(planes); d < depths.start(planes + 1); ++d) {
            now.origin[0] = axis[0].source_start + d * axis[0].source_step;
            for (int64_t h = heights.start(rows); h < heights.start(rows + 1); h += row_tile) {
                now.origin[1] = axis[1].source_start + h * axis[1].source_step;
                now.rows = smaller(row_tile, heights.start(rows + 1) - h);
                for (int64_t part = 0; part < widths.parts; ++part) {
                    const int64_t w = widths.start(part);
                    now.origin[2] = axis[2].source_start + w * axis[2].source_step;
                    T* voxel = to + d * now.target_stride[0] + h * now.target_stride[1] + w * now.target_stride[2];
                    const DepthwiseKernel<T> kernel = kernels[widths.size(part) - widths.low];
                    for (int64_t block = 0; block < blocks; ++block) {
                        const int64_t channel = first_channel(block);
                        now.source = from + channel;
                        now.target = voxel + channel;
                        body(now, block, kernel);
                    }
                }
            }
        }
    }
};

// Whether source and target are too large for a cache together, and a vector is a cache line of the target. Results
// that are written past the caches leave the source there.
template <typename T>
bool streams_depthwise(const Gather& gather, const T* target) {
    constexpr int64_t kLargeBytes = int64_t{32} << 20, kLine = 64;
    int64_t voxels[2] = {1, 1};
    for (const GatherAxis& axis : gather.axis) {
        voxels[0] *= axis.source_size;
        voxels[1] *= axis.target_size;
    }
    const int64_t voxel_bytes = gather.groups * static_cast<int64_t>(sizeof(T));
    return PVC_VECTOR_BYTES == kLine && voxel_bytes % kLine == 0 && reinterpret_cast<intptr_t>(target) % kLine == 0 &&
           gather.batch * (voxels[0] + voxels[1]) * voxel_bytes >= kLargeBytes;
}

// Computes every target voxel of the gather; `bias` (one value per channel) may be null.
template <typename T>
void depthwise_gather(const Gather& gather, const T* source, const T* weight, const T* bias, T* target) {
    constexpr int64_t lanes = Vector<T>::lanes;
    DepthwiseWalk<T> walk(gather, walks_rows(gather) ? DepthwisePass::rows : DepthwisePass::strided);
    walk.tile.stream = streams_depthwise<T>(gather, target);
    T* packed = scratch<T>(Scratch::shared_weights, walk.blocks * (walk.taps + 1) * lanes);
    T* initial = packed + walk.blocks * walk.taps * lanes;
    Gather by_group = gather;
    by_group.weight_target_stride = gather.weight_group_stride;
    for (int64_t block = 0; block < walk.blocks; ++block) {
        const int64_t channel = walk.first_channel(block);
        pack_taps(by_group, weight + channel * gather.weight_group_stride, 1, 1, lanes, lanes,
                  packed + block * walk.taps * lanes);
        for (int64_t i = 0; i < lanes; ++i) initial[block * lanes + i] = bias == nullptr ? 0 : bias[channel + i];
    }
    parallel_for(walk.tasks(), [&](int64_t task) {
        walk.run(task, source, target, [&](DepthwiseTile<T>& tile, int64_t block, DepthwiseKernel<T> kernel) {
            tile.weights = packed + block * walk.taps * lanes;
            tile.initial = initial + block * lanes;
            kernel(tile);
        });
        Vector<T>::finish_stream();
    });
}

}  // namespace
}  // namespace pvc
