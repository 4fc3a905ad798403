// Depthwise convolution on tensors in ndhwc as they are: tiles of up to two rows of neighbouring target voxels x one
// vector of channels, each channel with its own weights.
//
// Along an axis where neighbouring voxels and neighbouring taps are one source voxel apart, each source value is loaded
// once per tile and kernel plane and meets all its taps in both rows: for R voxels, K taps along the width and K along
// the height (K + 1) (R + K - 1) source vectors for 2 R K K FMAs. A gather with other steps loads a source value for
// each FMA.
//
// Rows and planes outside of the source are skipped; beyond the ends of a row zeros are read.
#pragma once

#include "../isa.h"

namespace pvc {
namespace {

template <typename T>
struct DepthwiseTile {
    const T* source;   // the sample's first voxel, the block's first channel
    const T* weights;  // [taps 0][taps 1][taps 2][lanes]
    const T* initial;  // one vector: what the sums start from
    T* target;         // the tile's first voxel
    T* sums;           // gradient of the weights, ordered as weights; `target` is then read
    int64_t source_stride[3], target_stride[3];
    int64_t size[3];    // of the source
    int64_t origin[3];  // source position of the first voxel and tap
    int64_t source_step[3], taps[3], tap_step[3];
    int64_t rows;  // 1 or 2
    bool stream;   // targets are written past the caches
};

inline bool inside(int64_t position, int64_t size) {
    return static_cast<uint64_t>(position) < static_cast<uint64_t>(size);
}

template <typename T>
constexpr T depthwise_zeros[PVC_VECTOR_BYTES / sizeof(T)] = {};

// Calls body(row, tap, in_first, in_second) for every source row that meets the tile: its voxel at the tile's origin,
// the offset (in taps along the width) of the weights with which it meets the first row of targets, and whether it
// meets the first and the second. With the second it meets the taps of one row before.
template <typename T, typename Body>
inline void for_source_rows(const DepthwiseTile<T>& a, const Body& body) {
    const T* first = a.source + a.origin[2] * a.source_stride[2];
    for (int64_t d = 0; d < a.taps[0]; ++d) {
        const int64_t depth = a.origin[0] + d * a.tap_step[0];
        if (!inside(depth, a.size[0])) continue;
        for (int64_t h = 0; h < a.taps[1] + a.rows - 1; ++h) {
            const int64_t height = a.origin[1] + h;
            if (!inside(height, a.size[1])) continue;
            const T* row = first + depth * a.source_stride[0] + height * a.source_stride[1];
            body(row, (d * a.taps[1] + h) * a.taps[2], h < a.taps[1], a.rows == 2 && h > 0);
        }
    }
}

template <bool Value>
struct Constant {
    static constexpr bool value = Value;
};

template <typename Body>
inline void for_target_rows(bool in_first, bool in_second, const Body& body) {
    if (in_first && in_second) {
        body(Constant<true>(), Constant<true>());
    } else if (in_first) {
        body(Constant<true>(), Constant<false>());
    } else {
        body(Constant<false>(), Constant<true>());
    }
}

// Calls body(value, i) for the R + K - 1 values of a source row.
template <typename T, int Count, typename Body>
inline void for_source_values(const DepthwiseTile<T>& a, const T* row, const Body& body) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) {
        const T* at = inside(a.origin[2] + i, a.size[2]) ? row + i * a.source_stride[2] : depthwise_zeros<T>;
        body(Vector<T>::load(at), i);
    }
}

template <typename T, int R>
inline void store_row(const DepthwiseTile<T>& a, T* to, const typename Vector<T>::type (&sum)[R]) {
    if (a.stream) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) Vector<T>::stream(to + r * a.target_stride[2], sum[r]);
        return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) Vector<T>::store(to + r * a.target_stride[2], sum[r]);
}

template <typename T, int R, int K>
void depthwise_rows_tile(const DepthwiseTile<T>& a) {
    using V = Vector<T>;
    typename V::type sum[2][R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[0][r] = sum[1][r] = V::load(a.initial);
    for_source_rows(a, [&](const T* row, int64_t tap, bool in_first, bool in_second) __attribute__((always_inline)) {
        const T* weights = a.weights + tap * V::lanes;
        const auto add = [&](auto first, auto second) __attribute__((always_inline)) {
            typename V::type weight[2][K];
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                if constexpr (first.value) weight[0][k] = V::load(weights + k * V::lanes);
                if constexpr (second.value) weight[1][k] = V::load(weights + (k - K) * V::lanes);
            }
            for_source_values<T, R + K - 1>(a, row, [&](typename V::type value, int i) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) {
                    if (i - k < 0 || i - k >= R) continue;
                    if constexpr (first.value) sum[0][i - k] += value * weight[0][k];
                    if constexpr (second.value) sum[1][i - k] += value * weight[1][k];
                }
            });
        };
        for_target_rows(in_first, in_second, add);
    });
    store_row<T, R>(a, a.target, sum[0]);
    if (a.rows == 2) store_row<T, R>(a, a.target + a.target_stride[1], sum[1]);
}

// Any steps; one row.
template <typename T, int R>
void depthwise_strided_tile(const DepthwiseTile<T>& a) {
    using V = Vector<T>;
    typename V::type sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = V::load(a.initial);
    const T* weights = a.weights;
    for (int64_t d = 0; d < a.taps[0]; ++d) {
        const int64_t depth = a.origin[0] + d * a.tap_step[0];
        for (int64_t h = 0; h < a.taps[1]; ++h) {
            const int64_t height = a.origin[1] + h * a.tap_step[1];
            if (!inside(depth, a.size[0]) || !inside(height, a.size[1])) {
                weights += a.taps[2] * V::lanes;
                continue;
            }
            const T* row = a.source + depth * a.source_stride[0] + height * a.source_stride[1];
            for (int64_t w = 0; w < a.taps[2]; ++w, weights += V::lanes) {
                const typename V::type weight = V::load(weights);
                int64_t position = a.origin[2] + w * a.tap_step[2];
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r, position += a.source_step[2]) {
                    const T* at =
                        inside(position, a.size[2]) ? row + position * a.source_stride[2] : depthwise_zeros<T>;
                    sum[r] += V::load(at) * weight;
                }
            }
        }
    }
    store_row<T, R>(a, a.target, sum);
}

// The mirror image of the first: gradients of the targets stay in registers, those of the weights are added to memory.
template <typename T, int R, int K>
void depthwise_grad_weight_tile(const DepthwiseTile<T>& a) {
    using V = Vector<T>;
    typename V::type gradient[2][R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        gradient[0][r] = V::load(a.target + r * a.target_stride[2]);
        gradient[1][r] = V::load(a.target + (a.rows - 1) * a.target_stride[1] + r * a.target_stride[2]);
    }
    for_source_rows(a, [&](const T* row, int64_t tap, bool in_first, bool in_second) __attribute__((always_inline)) {
        T* sums = a.sums + tap * V::lanes;
        const auto add = [&](auto first, auto second) __attribute__((always_inline)) {
            typename V::type sum[2][K];
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                if constexpr (first.value) sum[0][k] = V::load(sums + k * V::lanes);
                if constexpr (second.value) sum[1][k] = V::load(sums + (k - K) * V::lanes);
            }
            for_source_values<T, R + K - 1>(a, row, [&](typename V::type value, int i) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) {
                    if (i - k < 0 || i - k >= R) continue;
                    if constexpr (first.value) sum[0][k] += value * gradient[0][i - k];
                    if constexpr (second.value) sum[1][k] += value * gradient[1][i - k];
                }
            });
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                if constexpr (first.value) V::store(sums + k * V::lanes, sum[0][k]);
                if constexpr (second.value) V::store(sums + (k - K) * V::lanes, sum[1][k]);
            }
        };
        for_target_rows(in_first, in_second, add);
    });
}

template <typename T>
using DepthwiseKernel = void (*)(const DepthwiseTile<T>&);

// Most voxels of a row in a tile: two rows of them, the weights of two rows of taps and a source value fit the
// registers.
constexpr int kDepthwiseRun = kVectorRegisters == 32 ? 8 : 4;

enum class DepthwisePass { strided, rows, grad_weight };

template <typename T, DepthwisePass Pass, int K, int R = kDepthwiseRun>
DepthwiseKernel<T> depthwise_kernel_of(int64_t voxels) {
    if constexpr (R > 1) {
        if (voxels < R) return depthwise_kernel_of<T, Pass, K, R - 1>(voxels);
    }
    if constexpr (Pass == DepthwisePass::strided) return depthwise_strided_tile<T, R>;
    if constexpr (Pass == DepthwisePass::rows) return depthwise_rows_tile<T, R, K>;
    return depthwise_grad_weight_tile<T, R, K>;
}

// The tile of `voxels` voxels per row; `taps` along the width are 3 or 5 where rows are walked.
template <typename T>
DepthwiseKernel<T> depthwise_kernel(DepthwisePass pass, int64_t taps, int64_t voxels) {
    if (pass == DepthwisePass::strided) return depthwise_kernel_of<T, DepthwisePass::strided, 0>(voxels);
    if (pass == DepthwisePass::rows) {
        return taps == 3 ? depthwise_kernel_of<T, DepthwisePass::rows, 3>(voxels)
                         : depthwise_kernel_of<T, DepthwisePass::rows, 5>(voxels);
    }
    return taps == 3 ? depthwise_kernel_of<T, DepthwisePass::grad_weight, 3>(voxels)
                     : depthwise_kernel_of<T, DepthwisePass::grad_weight, 5>(voxels);
}

}  // namespace
}  // namespace pvc
