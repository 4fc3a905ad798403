// Matrix products without packing, on ndhwc tensors as they are: kernels of 1x1x1, and grad_input where windows touch
// (kernel == stride: ConvTranspose3d for up-sampling, patch embeddings).
//
//   forward     y[o][n]                 = sum over channels k of  x[o * stride][k] * w[n][k]
//   grad_input  dx[o * stride + t][n]   = sum over channels k of  dy[o][k] * w[k][t][n]      for every tap t
//
// Each source value is read for one output voxel o only, so there is little to gain from a copy. Rows of a product are
// output voxels, lanes its columns n, and the register tile is that of microkernel/broadcast.h; taps are groups of
// columns that write to places of their own. (Forward with more taps does gain: a copy in order is what hardware
// prefetches.)
#pragma once

#include "../arena.h"
#include "../microkernel/broadcast.h"
#include "../parallel.h"
#include "gather.h"

namespace pvc {
namespace {

struct PatchProduct {
    int64_t batch, grid[3];                  // output voxels
    int64_t source_sample, target_sample;    // elements of a sample
    int64_t source_step[3], target_step[3];  // elements from one output voxel to the next
    int64_t taps[3], target_tap[3];          // elements from one tap to the next
    int64_t depth, columns;                  // channels summed over, channels written
    int64_t weight_depth, weight_column, weight_tap;

    int64_t tap_count() const { return taps[0] * taps[1] * taps[2]; }
    int64_t voxels() const { return grid[0] * grid[1] * grid[2]; }
};

// Whether a pass is such a product and writes every value of its result.
inline bool is_patch_product(const ConvProblem& problem, bool forward) {
    const bool last = problem.layout == Layout::ndhwc && problem.source_layout == Layout::ndhwc &&
                      problem.weight_layout == Layout::ndhwc;
    if (!last || problem.groups != 1) return false;
    // A source that is read for many blocks of columns is worth its copy.
    const bool wide = forward ? problem.out_channels > problem.in_channels : problem.in_channels > problem.out_channels;
    int64_t voxels = 1, taps = 1;
    for (int a = 0; a < 3; ++a) {
        if (problem.padding_begin[a] != 0 || problem.padding_end[a] != 0 || problem.dilation[a] != 1) return false;
        const bool touch = problem.kernel_size[a] == problem.stride[a] &&
                           problem.output_size[a] * problem.stride[a] == problem.input_size[a];
        if (forward ? problem.kernel_size[a] != 1 : !touch) return false;
        voxels *= problem.input_size[a];
        taps *= problem.kernel_size[a];
    }
    if (taps == 1 && wide) return false;
    const int64_t channels = larger(problem.in_channels, problem.out_channels);
    return voxels * channels <= INT32_MAX;  // offsets of a tile have 32 bits
}

inline PatchProduct patch_product(const ConvProblem& problem, bool forward) {
    PatchProduct p = {};
    p.batch = problem.batch;
    p.depth = forward ? problem.in_channels : problem.out_channels;
    p.columns = forward ? problem.out_channels : problem.in_channels;
    p.weight_tap = problem.in_channels;
    const int64_t filter =
        problem.in_channels * problem.kernel_size[0] * problem.kernel_size[1] * problem.kernel_size[2];
    p.weight_depth = forward ? 1 : filter;
    p.weight_column = forward ? filter : 1;
    int64_t input = problem.in_channels, output = problem.out_channels;
    for (int a = 2; a >= 0; --a) {
        p.grid[a] = problem.output_size[a];
        p.taps[a] = problem.kernel_size[a];
        p.source_step[a] = forward ? input * problem.stride[a] : output;
        p.target_step[a] = forward ? output : input * problem.stride[a];
        p.target_tap[a] = input;
        input *= problem.input_size[a];
        output *= problem.output_size[a];
    }
    p.source_sample = forward ? input : output;
    p.target_sample = forward ? output : input;
    return p;
}

template <typename T>
struct PatchPass {
    static constexpr int64_t lanes = Vector<T>::lanes;

    const PatchProduct p;
    const EvenCut blocks;  // of vectors of columns
    const EvenCut chunks;  // of output voxels: a task
    T* weights;            // [tap][block][depth][block width]
    T* initial;
    Segment segment;

    PatchPass(const PatchProduct& product, const T* weight, const T* bias)
        : p(product),
          blocks(ceil_divide(p.columns, lanes), kBroadcastVectors),
          chunks(p.voxels(), chunk_voxels(p)),
          segment{0, static_cast<int32_t>(p.depth)} {
        const int64_t width = ceil_divide(p.columns, lanes) * lanes, packed = p.tap_count() * p.depth * width;
        weights = scratch<T>(Scratch::shared_weights, packed + width);
        initial = weights + packed;
        for (int64_t n = 0; n < width; ++n) initial[n] = bias != nullptr && n < p.columns ? bias[n] : 0;
        const int64_t tasks = p.tap_count() * blocks.parts;
        constexpr int64_t kParallelPack = 1 << 15;  // values; less is quicker than waking a thread
        if (packed >= kParallelPack) {
            parallel_for(tasks, [&](int64_t task) { pack(task, weight); });
        } else {
            for (int64_t task = 0; task < tasks; ++task) pack(task, weight);
        }
    }

    // Rows enough for a block of weights to be worth loading; they stay near while all columns pass.
    static int64_t chunk_voxels(const PatchProduct& p) {
        return smaller(larger(kL1Bytes / 4 / static_cast<int64_t>(sizeof(T)) / p.depth, 128), 512);
    }

    T* block_weights(int64_t tap, int64_t block) const {
        const int64_t width = ceil_divide(p.columns, lanes) * lanes;
        return weights + p.depth * (tap * width + blocks.start(block) * lanes);
    }

    void pack(int64_t task, const T* weight) const {
        const int64_t block = task % blocks.parts, tap = task / blocks.parts;
        const int64_t first = blocks.start(block) * lanes, width = blocks.size(block) * lanes;
        const int64_t filled = smaller(width, p.columns - first);
        const T* from = weight + first * p.weight_column + tap * p.weight_tap;
        T* to = block_weights(tap, block);
        for (int64_t k = 0; k < p.depth; ++k, to += width) {
            for (int64_t n = 0; n < filled; ++n) to[n] = from[k * p.weight_depth + n * p.weight_column];
            for (int64_t n = filled; n < width; ++n) to[n] = 0;
        }
    }

    // Whether a result is too large to be found in a cache again, and a block writes whole cache lines of it.
    bool streams(const T* target, int64_t width) const {
        constexpr int64_t kLargeBytes = int64_t{64} << 20, kLine = 64, size = sizeof(T);
        return p.batch * p.target_sample * size >= kLargeBytes && width * size % kLine == 0 &&
               p.columns * size % kLine == 0 && reinterpret_cast<intptr_t>(target) % kLine == 0;
    }

    void run(int64_t task, const T* source, T* target) const {
        const int64_t sample = task / chunks.parts, chunk = task % chunks.parts;
        const int64_t first = chunks.start(chunk), count = chunks.size(chunk);
        int64_t* places = static_cast<int64_t*>(
            scratch_bytes(Scratch::tile_output, static_cast<size_t>(count) * (sizeof(int64_t) + sizeof(int32_t))));
        int32_t* items = reinterpret_cast<int32_t*>(places + count);
        int64_t w = first % p.grid[2], h = first / p.grid[2] % p.grid[1], d = first / (p.grid[2] * p.grid[1]);
        for (int64_t i = 0; i < count; ++i) {
            items[i] = static_cast<int32_t>(d * p.source_step[0] + h * p.source_step[1] + w * p.source_step[2]);
            places[i] = d * p.target_step[0] + h * p.target_step[1] + w * p.target_step[2];
            if (++w < p.grid[2]) continue;
            w = 0;
            if (++h < p.grid[1]) continue;
            h = 0;
            ++d;
        }
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
        for (int64_t i = 0; i < count; ++i) {
            const T* row = source + sample * p.source_sample + items[i];
            for (int64_t k = 0; k < p.depth; k += kLine) __builtin_prefetch(row + k);
        }
        TileArguments<T> a = {};
        a.source = source + sample * p.source_sample;
        a.segments = &segment;
        a.segment_count = 1;
        T* to = target + sample * p.target_sample;
        for (int64_t tap = 0; tap < p.tap_count(); ++tap) {
            const int64_t d = tap / (p.taps[1] * p.taps[2]), h = tap / p.taps[2] % p.taps[1];
            const int64_t place = d * p.target_tap[0] + h * p.target_tap[1] + tap % p.taps[2] * p.target_tap[2];
            for (int64_t block = 0; block < blocks.parts; ++block) {
                const int64_t channel = blocks.start(block) * lanes;
                a.weights = block_weights(tap, block);
                a.initial = initial + channel;
                run_block(a, blocks.size(block), count, items, places, p.columns - channel, to + place + channel);
            }
        }
        Vector<T>::finish_stream();
    }

    // One block of columns, of which `channels` (or the whole block) exist, of all voxels of a task.
    void run_block(TileArguments<T> a, int64_t vectors, int64_t count, const int32_t* items, const int64_t* places,
                   int64_t channels, T* to) const {
        const int64_t width = vectors * lanes;
        const bool whole = channels >= width;
        const EvenCut tiles(count, broadcast_voxels(vectors));
        a.target = whole ? to : nullptr;
        a.stream = whole && streams(to, width);
        a.sums = scratch<T>(Scratch::tile_accumulators, broadcast_voxels(vectors) * width);
        for (int64_t t = 0; t < tiles.parts; ++t) {
            const int64_t start = tiles.start(t), rows = tiles.size(t);
            a.items = items + start;
            a.places = places + start;
            kernel(vectors, rows)(a);
            if (whole) continue;
            for (int64_t m = 0; m < rows; ++m) {
                for (int64_t n = 0; n < channels; ++n) to[a.places[m] + n] = a.sums[m * width + n];
            }
        }
    }

    static Microkernel<T> kernel(int64_t vectors, int64_t rows) {
        if (vectors == 1) return broadcast_tile_of<T, 1, 0>(rows);
        return vectors == 2 ? broadcast_tile_of<T, 2, 0>(rows) : broadcast_tile_of<T, 3, 0>(rows);
    }
};

template <typename T>
void run_patch_product(const PatchProduct& product, const T* source, const T* weight, const T* bias, T* target) {
    const PatchPass<T> pass(product, weight, bias);
    parallel_for(product.batch * pass.chunks.parts, [&](int64_t task) { pass.run(task, source, target); });
}

}  // namespace
}  // namespace pvc
