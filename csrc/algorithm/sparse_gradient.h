// The gradient behind a max-pool, read as what it is: one non-zero pre-pool voxel per pooled value.
//
// Pooled voxel p with code c is the gradient of output voxel p * pool_stride - pool_padding + position(c). Both sparse
// passes turn codes into offsets that are linear in the position, a table of 256 entries. kNoVoxel stands for a
// gradient of zero. Any other code beyond the window is read as 0, so that no byte can lead outside of what the passes
// allocate for whole windows.
#pragma once

#include "../microkernel/grad_weight_pack.h"
#include "../microkernel/sparse_list.h"
#include "../microkernel/sparse_sum.h"
#include "../parallel.h"
#include "pack_source.h"

namespace pvc {
namespace {

inline void list_code_offsets(const PooledProblem& problem, const int64_t step[3], int32_t offsets[256]) {
    const int64_t* window = problem.pool_window;
    for (int64_t code = 0; code < 256; ++code) {
        const int64_t d = code / (window[1] * window[2]), h = code / window[2] % window[1], w = code % window[2];
        offsets[code] = d < window[0] ? static_cast<int32_t>(d * step[0] + h * step[1] + w * step[2]) : 0;
    }
}

// `total` cut into the fewest parts of at most `most`: the size of the largest part.
inline int64_t even_part(int64_t total, int64_t most) { return ceil_divide(total, ceil_divide(total, most)); }

// Target voxels of the forward gather in cells that are the windows of the pooling.
inline Gather gather_windows(const PooledProblem& problem) {
    Gather gather = gather_channels(problem.conv, true);
    for (int a = 0; a < 3; ++a) {
        gather.axis[a] = forward_axis(problem.conv, a);
        gather.window[a] = {problem.pooled_size[a], problem.pool_window[a], problem.pool_stride[a],
                            -problem.pool_padding[a]};
    }
    return gather;
}

// Tile `index` of all samples: its windows, and the source position of its first voxel and tap.
struct PooledTile {
    int64_t sample, cell[3], count[3], origin[3];

    PooledTile(const Gather& gather, const Tiling& tiling, int64_t index) {
        sample = index / tiling.count();
        int64_t rest = index % tiling.count();
        for (int a = 2; a >= 0; --a) {
            const CellAxis& cells = gather.window[a];
            cell[a] = rest % tiling.tiles[a] * tiling.cells[a];
            rest /= tiling.tiles[a];
            count[a] = smaller(tiling.cells[a], cells.count - cell[a]);
            origin[a] = gather.axis[a].source_start + (cells.first + cell[a] * cells.step) * gather.axis[a].source_step;
        }
    }
};

// How the sums of a weight gradient are shared out: `units` of `parts` of `part_size` values each, once per split of
// all tiles.
struct SplitSums {
    int64_t units, parts, part_size, splits;

    SplitSums(int64_t units, int64_t parts, int64_t part_size, int64_t tiles, size_t value_bytes)
        : units(units), parts(parts), part_size(part_size) {
        constexpr int64_t kTasks = 32, kPartialBytes = 16 << 20;
        const int64_t bytes = units * parts * part_size * static_cast<int64_t>(value_bytes);
        splits = smaller(smaller(ceil_divide(kTasks, units), tiles), kPartialBytes / bytes);
        splits = larger(splits, 1);
    }

    // Calls sum(unit, first tile, last tile, sums that are zero), adds the splits in order, and calls store(unit, part,
    // sums of the part).
    template <typename T, typename Sum, typename Store>
    void run(int64_t tiles, const Sum& sum, const Store& store) const {
        constexpr int64_t lanes = Vector<T>::lanes;
        const int64_t all = units * parts * part_size;
        T* partials = scratch<T>(Scratch::shared_partials, splits * all);
        parallel_for(splits * units, [&](int64_t task) {
            const int64_t split = task / units;
            T* sums = partials + task * parts * part_size;
            fill_zero(sums, parts * part_size);
            sum(task % units, split * tiles / splits, (split + 1) * tiles / splits, sums);
        });
        parallel_for(units * parts, [&](int64_t task) {
            T* total = partials + task * part_size;
            for (int64_t split = 1; split < splits; ++split) {
                const T* partial = total + split * all;
                for (int64_t i = 0; i < part_size; i += lanes) {
                    Vector<T>::store(total + i, Vector<T>::load(total + i) + Vector<T>::load(partial + i));
                }
            }
            store(task / parts, task % parts, total);
        });
    }
};

// Runs of consecutive values under the taps of one kernel row: along the width and the channels where the taps are
// neighbours in memory, else along the channels of one tap. Runs are cut into segments of `vectors` vectors each.
struct SegmentShape {
    bool joined;
    int64_t rows;                   // runs of a kernel
    int64_t length;                 // values of a run
    int64_t pieces, vectors, tail;  // segments of a run, vectors of a segment, values of a run's last vector

    template <typename T>
    static SegmentShape of(const ConvProblem& problem, int64_t channels, bool joined) {
        constexpr int64_t lanes = Vector<T>::lanes;
        const int64_t* kernel = problem.kernel_size;
        SegmentShape shape = {};
        shape.joined = joined;
        shape.rows = kernel[0] * kernel[1] * (joined ? 1 : kernel[2]);
        shape.length = channels * (joined ? kernel[2] : 1);
        const int64_t all = ceil_divide(shape.length, lanes);
        shape.pieces = ceil_divide(all, kSparseVectors);
        shape.vectors = ceil_divide(all, shape.pieces);
        shape.tail = shape.length - (all - 1) * lanes;
        return shape;
    }
};

}  // namespace
}  // namespace pvc
