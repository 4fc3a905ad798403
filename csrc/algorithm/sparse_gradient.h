// The gradient behind a max-pool, read as what it is: one non-zero pre-pool voxel per pooled value.
//
// Pooled voxel p with code c is the gradient of output voxel p * pool_stride - pool_padding + position(c). Both sparse
// passes turn codes into offsets that are linear in the position, a table of 256 entries. A code beyond the window is
// read as 0, so that no byte can lead outside of what the passes allocate for whole windows.
#pragma once

#include "../microkernel/grad_weight_pack.h"
#include "../microkernel/sparse_sum.h"

namespace pvc {
namespace {

// Of a gradient, NaN included; without a branch, which would be mispredicted.
inline bool nonzero(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + bits != 0;
}

inline bool nonzero(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + bits != 0;
}

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
