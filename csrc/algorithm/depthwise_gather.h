// Depthwise convolution in ndhwc without packing, on the walk of depthwise_walk.h.
//
// Results that are too large for a cache together with the source go to memory past the caches: no line is read before
// it is overwritten, and the source stays. Where vectors are no lines of the target, whole rows are collected first.
#pragma once

#include "../arena.h"
#include "../parallel.h"
#include "depthwise_walk.h"
#include "pack_weight.h"

namespace pvc {
namespace {

// Rows of targets, written where they belong.
template <typename T>
struct RowsInPlace {
    T* begin(T* place) { return place; }
    void write_share() {}
    void end(T*, int64_t, int64_t) {}
    void finish() {}
};

// Rows of targets, collected in one of two buffers that lie to the cache lines like the target, and written to it by
// whole lines past the caches while the next rows are computed: in one go, the processor would wait for memory.
template <typename T>
class RowsPastCaches {
  public:
    static constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));

    RowsPastCaches(T* buffers, int64_t values) : buffers_{buffers, buffers + values} {}

    T* begin(T* place) {
        now_ = !now_;
        return buffers_[now_] + into_line(place);
    }

    void write_share() { write(smaller(share_, lines_)); }

    // `count` values, begun at `place`, are computed; they are written in `shares` calls of write_share.
    void end(T* place, int64_t count, int64_t shares) {
        finish();
        from_ = buffers_[now_] + into_line(place);
        to_ = place;
        const int64_t head = smaller((line - into_line(place)) % line, count), body = (count - head) / line * line;
        std::memcpy(to_, from_, static_cast<size_t>(head) * sizeof(T));
        std::memcpy(to_ + head + body, from_ + head + body, static_cast<size_t>(count - head - body) * sizeof(T));
        from_ += head;
        to_ += head;
        lines_ = body / line;
        share_ = ceil_divide(lines_, shares);
    }

    void finish() { write(lines_); }

  private:
    static int64_t into_line(const T* place) {
        return reinterpret_cast<intptr_t>(place) / static_cast<int64_t>(sizeof(T)) % line;
    }

    void write(int64_t lines) {
        lines_ -= lines;
        for (; lines > 0; --lines, from_ += line, to_ += line) {
            for (int64_t i = 0; i < line; i += Vector<T>::lanes) {
                Vector<T>::stream(to_ + i, Vector<T>::load(from_ + i));
            }
        }
    }

    T* buffers_[2];
    bool now_ = false;
    const T* from_ = nullptr;
    T* to_ = nullptr;
    int64_t lines_ = 0, share_ = 0;  // left to write
};

// Whether source and target are too large for a cache together.
template <typename T>
bool exceeds_caches(const Gather& gather) {
    constexpr int64_t kLargeBytes = int64_t{32} << 20;
    int64_t voxels[2] = {1, 1};
    for (const GatherAxis& axis : gather.axis) {
        voxels[0] *= axis.source_size;
        voxels[1] *= axis.target_size;
    }
    return gather.batch * (voxels[0] + voxels[1]) * gather.groups * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
}

// Computes every target voxel of the gather; `bias` (one value per channel) may be null.
template <typename T>
void depthwise_gather(const Gather& gather, const T* source, const T* weight, const T* bias, T* target) {
    constexpr int64_t lanes = Vector<T>::lanes;
    DepthwiseWalk<T> walk(gather, walks_rows(gather) ? DepthwisePass::rows : DepthwisePass::strided);
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
    const auto compute = [&](DepthwiseTile<T>& tile, int64_t block, DepthwiseKernel<T> kernel) {
        tile.weights = packed + block * walk.taps * lanes;
        tile.initial = initial + block * lanes;
        kernel(tile);
    };
    const bool dense = gather.axis[1].target_step == 1 && gather.axis[2].target_step == 1;
    const bool past_caches = kStreams && exceeds_caches<T>(gather);
    // A vector that is a line needs no buffer.
    constexpr int64_t line = RowsPastCaches<T>::line;
    walk.tile.stream = past_caches && lanes == line && gather.groups % line == 0 &&
                       reinterpret_cast<intptr_t>(target) % (line * static_cast<int64_t>(sizeof(T))) == 0;
    parallel_for(walk.tasks(), [&](int64_t task) {
        if (past_caches && dense && !walk.tile.stream) {
            const int64_t values = (ceil_divide(walk.row_tile * walk.tile.target_stride[1], line) + 2) * line;
            RowsPastCaches<T> rows(scratch<T>(Scratch::tile_rows, 2 * values), values);
            walk.run(task, source, target, rows, compute);
        } else {
            walk.run(task, source, target, RowsInPlace<T>(), compute);
        }
        Vector<T>::finish_stream();
    });
}

}  // namespace
}  // namespace pvc
