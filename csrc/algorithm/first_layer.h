// Forward for few input channels, alone and fused with activation and max-pool: 3x3x3 kernels, stride and dilation 1,
// one group; of a pool windows of 2 x 2 x 2 that touch (the caller checks).
//
// A task is a slab of tiles of one sample (first_layer_source.h). Row by row of tiles and vector by vector of output
// channels the microkernel computes the outputs in registers (microkernel/first_layer_tile.h). Behind a ReLU it pools
// them there too, for the eight outputs of a tile are a window: of the convolution nothing is stored.
//
// Transforms mix the voxels of a tile: an infinity or NaN would spread over it, and values near the end of the range
// would overflow between the transforms. A slab that holds such values, or all when weights or bias do, is computed
// directly.
#pragma once

#include "first_layer_slabs.h"
#include "first_layer_weights.h"
#include "pool_store.h"

namespace pvc {
namespace {

// Computes the tiles first .. tiles - 1 of a row from their points and calls store(tile, outputs); `a.source` is that
// of the first.
template <typename T, int Channels, typename Store>
PVC_INLINE void compute_strip(FirstLayerArguments<T> a, int64_t first, int64_t tiles, const Store& store) {
    for (int64_t tile = first; tile < tiles; tile += kFirstLayerTiles, a.source += kFirstLayerTiles) {
        FirstLayerOutputs<T> y = FirstLayerTile<T, Channels>::compute(a);
        store(tile, y);
    }
}

// Where a row of tiles and one vector of channels go: values of neighbouring voxels are `pitch` apart. Of the last
// tiles of a row only those are stored that exist.
template <typename T>
struct FirstLayerRow {
    int64_t tiles;
    T* values;  // [d][h] `rows` apart, or pooled
    int64_t pitch, row[2];
    uint8_t* codes;  // where `values` are pooled, or null
    int64_t code_pitch;
    int64_t size[3];  // outputs to store from the row's first tile on
    bool stream;      // `values` are written past the caches
};

template <typename T, int Channels>
void store_strip(const FirstLayerArguments<T>& a, int64_t first, int64_t end, const FirstLayerRow<T>& to) {
    using V = Vector<T>;
    compute_strip<T, Channels>(a, first, end, [&](int64_t tile, FirstLayerOutputs<T>& y) {
        const auto for_outputs = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int t = 0; t < kFirstLayerTiles; ++t) {
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    const int64_t w = 2 * (tile + t) + i % 2;
                    body(i, w, to.values + i / 4 * to.row[0] + i / 2 % 2 * to.row[1] + w * to.pitch, y.of[i][t]);
                }
            }
        };
        const bool whole = to.size[0] >= 2 && to.size[1] >= 2 && 2 * (tile + kFirstLayerTiles) <= to.size[2];
        if (whole && to.stream) {
            for_outputs([](int, int64_t, T* place, typename V::type value)
                            __attribute__((always_inline)) { V::stream(place, value); });
        } else if (whole) {
            for_outputs([](int, int64_t, T* place, typename V::type value)
                            __attribute__((always_inline)) { V::store(place, value); });
        } else {
            for_outputs([&](int i, int64_t w, T* place, typename V::type value) __attribute__((always_inline)) {
                if (i / 4 < to.size[0] && i / 2 % 2 < to.size[1] && w < to.size[2]) V::store(place, value);
            });
        }
    });
}

// ReLU and the maximum of each tile.
template <typename T, int Channels, bool Codes>
void pool_strip(const FirstLayerArguments<T>& a, int64_t first, int64_t end, const FirstLayerRow<T>& to) {
    using V = Vector<T>;
    const bool whole = to.size[0] >= 2 && to.size[1] >= 2;
    compute_strip<T, Channels>(a, first, end, [&](int64_t tile, FirstLayerOutputs<T>& y) {
        if (!whole || to.size[2] < 2 * (tile + kFirstLayerTiles)) {  // zeros are never chosen before the first output
#pragma GCC unroll 8
            for (int i = 1; i < 8; ++i) {
#pragma GCC unroll 2
                for (int t = 0; t < kFirstLayerTiles; ++t) {
                    const bool inside =
                        i / 4 < to.size[0] && i / 2 % 2 < to.size[1] && 2 * (tile + t) + i % 2 < to.size[2];
                    if (!inside) y.of[i][t] = typename V::type{};
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < kFirstLayerTiles; ++t) {
            if (t > 0 && tile + t >= end) break;
            T* value = to.values + (tile + t) * to.pitch;
            if constexpr (Codes) {
                const FirstLayerPool<T> pool = FirstLayerPool<T>::of(&y.of[0][t], kFirstLayerTiles);
                V::store(value, pool.value);
                const auto bytes = LaneBytes<T>::narrow(pool.code);
                std::memcpy(to.codes + (tile + t) * to.code_pitch, &bytes, sizeof(bytes));
            } else {
                V::store(value, FirstLayerPool<T>::value_of(&y.of[0][t], kFirstLayerTiles));
            }
        }
    });
}

// The outputs of a row of tiles by the definition of the convolution; `values` are the first under it.
template <typename T>
void compute_row_directly(const FirstLayerSource<T>& source, const T* values, const T* taps, const T* bias,
                          int64_t channels, const FirstLayerRow<T>& to) {
    using V = Vector<T>;
    const int64_t stride[2] = {source.plane_stride(), source.row_stride()};
    for (int64_t tile = 0; tile < to.tiles; ++tile, values += 2) {
        typename V::type sum[8];
        for (int i = 0; i < 8; ++i) sum[i] = V::load(bias);
        const T* weights = taps;
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t tap = 0; tap < 27; ++tap, weights += V::lanes) {
                const T* at =
                    values + c * source.channel_stride() + tap / 9 * stride[0] + tap / 3 % 3 * stride[1] + tap % 3;
                const typename V::type weight = V::load(weights);
                for (int i = 0; i < 8; ++i) sum[i] += at[i / 4 * stride[0] + i / 2 % 2 * stride[1] + i % 2] * weight;
            }
        }
        for (int i = 0; i < 8; ++i) {
            const int64_t w = 2 * tile + i % 2;
            T* row = to.values + i / 4 * to.row[0] + i / 2 % 2 * to.row[1];
            if (i / 4 < to.size[0] && i / 2 % 2 < to.size[1] && w < to.size[2]) V::store(row + w * to.pitch, sum[i]);
        }
    }
}

// Computes one slab. For each row of tiles and vector of channels, row(tile, block, pools) says where it goes, and
// finish(tile, block, row, pooled) ends it; `pools` asks for ReLU and pool in registers, which needs finite values,
// `codes` for the voxels that they choose.
template <typename T, typename Row, typename Finish>
void compute_slab(const ConvProblem& problem, const FirstLayerWeights<T>& weights, const T* x,
                  const FirstLayerSlab& slab, bool pools, bool codes, const Row& row, const Finish& finish) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const Gather gather = first_layer_gather(problem);
    FirstLayerSource<T> source(gather, x, slab);
    const bool finite = source.within(weights.limit());
    FirstLayerArguments<T> a = {};
    a.channels = problem.in_channels;
    const bool single = a.channels == 1;
    const auto store = single            ? store_strip<T, 1>
                       : a.channels == 2 ? store_strip<T, 2>
                       : a.channels == 3 ? store_strip<T, 3>
                                         : store_strip<T, 4>;
    const auto pool = codes    ? single ? pool_strip<T, 1, true> : pool_strip<T, 0, true>
                      : single ? pool_strip<T, 1, false>
                               : pool_strip<T, 0, false>;
    const auto run = pools ? pool : store;
    // Blocks of channels follow one another tile by tile where the weights of all stay in L1: what lies side by side is
    // stored at one time.
    constexpr int64_t kLineBlocks = 4, kNearBytes = 16 << 10;
    const int64_t block_bytes = a.channels * kFirstLayerPoints * lanes * static_cast<int64_t>(sizeof(T));
    const int64_t step = kLineBlocks * block_bytes <= kNearBytes ? kFirstLayerTiles : lanes;
    int64_t tile[3] = {0, 0, 0};
    for (int64_t d = 0; d < slab.count[0]; ++d) {
        tile[0] = slab.first[0] + d;
        for (int64_t h = 0; h < slab.count[1]; ++h) {
            tile[1] = slab.first[1] + h;
            for (int64_t row = h == 0 ? 0 : 2 * h + 2; finite && row < 2 * h + 4; ++row) source.transform_row(d, row);
            const auto to = [&](int64_t block) {
                FirstLayerRow<T> to = row(tile, block, pools && finite);
                to.tiles = slab.count[2];
                for (int i = 0; i < 3; ++i)
                    to.size[i] = smaller(problem.output_size[i] - 2 * tile[i], 2 * slab.count[i]);
                return to;
            };
            for (int64_t w = 0; finite && w < slab.count[2]; w += lanes) {
                const T* points = source.points(2 * h, w / lanes);
                const int64_t end = smaller(w + lanes, slab.count[2]);
                for (int64_t block = 0; block < weights.blocks(); block += kLineBlocks) {
                    const int64_t count = smaller(weights.blocks() - block, kLineBlocks);
                    FirstLayerRow<T> rows[kLineBlocks];
                    for (int64_t i = 0; i < count; ++i) rows[i] = to(block + i);
                    for (int64_t tile = w; tile < end; tile += step) {
                        a.source = points + (tile - w);
                        for (int64_t i = 0; i < count; ++i) {
                            a.weight = weights.points(block + i);
                            a.bias = weights.bias(block + i);
                            run(a, tile, smaller(tile + step, end), rows[i]);
                        }
                    }
                }
            }
            for (int64_t block = 0; block < weights.blocks(); ++block) {
                if (!finite) {
                    compute_row_directly(source, source.values(d, h, 0), weights.taps(block), weights.bias(block),
                                         a.channels, to(block));
                }
                finish(tile, block, to(block), pools && finite);
            }
        }
    }
}

template <typename T>
void first_layer_forward(const ConvProblem& problem, const T* x, const T* weight, const T* bias, T* y) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const FirstLayerWeights<T> weights(problem, weight, bias);
    const int64_t* size = problem.output_size;
    const int64_t tiles[3] = {ceil_divide(size[0], 2), ceil_divide(size[1], 2), ceil_divide(size[2], 2)};
    const FirstLayerSlabs slabs(tiles, problem.batch, problem.in_channels * static_cast<int64_t>(sizeof(T)));
    const VolumeStrides strides = volume_strides(problem.layout, problem.out_channels, size);
    const RowStrides to = {strides.axis[2], strides.channel};
    const bool last = problem.layout == Layout::ndhwc;
    // What no cache holds until somebody reads it, where a vector is a line of its own.
    constexpr int64_t kLargeBytes = int64_t{32} << 20, kLine = 64;
    const bool stream = PVC_VECTOR_BYTES == kLine && problem.out_channels % lanes == 0 &&
                        reinterpret_cast<intptr_t>(y) % kLine == 0 &&
                        problem.batch * strides.sample * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
    parallel_for(problem.batch * slabs.count(), [&](int64_t task) {
        const FirstLayerSlab slab = slabs.slab(task);
        const int64_t buffer_row = size[2] * lanes;
        T* buffer = scratch<T>(Scratch::tile_rows, weights.blocks() * 4 * buffer_row);
        const auto place = [&](const int64_t tile[3], int64_t block) {
            return y + slab.sample * strides.sample + block * lanes * strides.channel + 2 * tile[0] * strides.axis[0] +
                   2 * tile[1] * strides.axis[1];
        };
        const auto direct = [&](int64_t block) { return last && weights.channels(block) == lanes; };
        const auto row = [&](const int64_t tile[3], int64_t block, bool) {
            FirstLayerRow<T> row = {};
            if (direct(block)) {
                row.values = place(tile, block);
                row.pitch = strides.axis[2];
                row.row[0] = strides.axis[0];
                row.row[1] = strides.axis[1];
                row.stream = stream;
            } else {
                row.values = buffer + block * 4 * buffer_row;
                row.pitch = lanes;
                row.row[0] = 2 * buffer_row;
                row.row[1] = buffer_row;
            }
            return row;
        };
        const auto finish = [&](const int64_t tile[3], int64_t block, const FirstLayerRow<T>& row, bool) {
            if (direct(block)) return;
            for (int64_t d = 0; d < smaller(row.size[0], 2); ++d) {
                for (int64_t h = 0; h < smaller(row.size[1], 2); ++h) {
                    copy_matrix(row.values + d * row.row[0] + h * row.row[1], RowStrides{lanes, 1},
                                place(tile, block) + d * strides.axis[0] + h * strides.axis[1], to, size[2],
                                weights.channels(block));
                }
            }
        };
        compute_slab(problem, weights, x, slab, false, false, row, finish);
        Vector<T>::finish_stream();
    });
}

template <typename T>
void first_layer_pooled(const PooledProblem& problem, const T* x, const T* weight, const T* bias, T* pooled,
                        uint8_t* code) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const ConvProblem& conv = problem.conv;
    const FirstLayerWeights<T> weights(conv, weight, bias);
    const int64_t* cells = problem.pooled_size;
    const FirstLayerSlabs slabs(cells, conv.batch, conv.in_channels * static_cast<int64_t>(sizeof(T)));
    const PooledTarget<T> target = {pooled, code, volume_strides(conv.layout, conv.out_channels, cells)};
    const VolumeStrides& strides = target.strides;
    const RowStrides to = {strides.axis[2], strides.channel}, own = {lanes, 1};
    const bool last = conv.layout == Layout::ndhwc;
    parallel_for(conv.batch * slabs.count(), [&](int64_t task) {
        const FirstLayerSlab slab = slabs.slab(task);
        const int64_t width = 2 * cells[2];
        const bool pools = problem.activation == Activation::relu;
        const int64_t buffer_row = width * lanes;
        T* buffer = scratch<T>(Scratch::tile_rows, weights.blocks() * 4 * buffer_row);
        uint8_t* codes = scratch<uint8_t>(Scratch::tile_output, weights.blocks() * cells[2] * lanes);
        const auto place = [&](const int64_t tile[3], int64_t block) {
            return slab.sample * strides.sample + block * lanes * strides.channel + tile[0] * strides.axis[0] +
                   tile[1] * strides.axis[1];
        };
        const auto direct = [&](int64_t block) { return last && weights.channels(block) == lanes; };
        const auto row = [&](const int64_t tile[3], int64_t block, bool in_registers) {
            FirstLayerRow<T> row = {};
            row.values = buffer + block * 4 * buffer_row;
            row.pitch = lanes;
            row.row[0] = 2 * buffer_row;
            row.row[1] = buffer_row;
            row.codes = codes + block * cells[2] * lanes;
            row.code_pitch = lanes;
            if (in_registers && direct(block)) {
                row.values = pooled + place(tile, block);
                row.pitch = strides.axis[2];
                if (code != nullptr) {
                    row.codes = code + place(tile, block);
                    row.code_pitch = strides.axis[2];
                }
            }
            return row;
        };
        const auto finish = [&](const int64_t tile[3], int64_t block, const FirstLayerRow<T>& from, bool in_registers) {
            const int64_t channels = weights.channels(block);
            if (in_registers) {
                if (direct(block)) return;
                copy_matrix(from.values, own, pooled + place(tile, block), to, cells[2], channels);
                if (code != nullptr) copy_codes(from.codes, own, code + place(tile, block), to, cells[2], channels);
                return;
            }
            PoolRow<T> row = {};
            row.values = from.values;
            row.channels = lanes;
            row.cells = cells[2];
            for (int a = 0; a < 3; ++a) row.first[a] = 2 * tile[a];
            row.stride[0] = from.row[0];
            row.stride[1] = from.row[1];
            row.stride[2] = lanes;
            row.depth = window_part(problem, 0, tile[0]);
            row.height = window_part(problem, 1, tile[1]);
            pool_row(problem, target, false, slab.sample, tile, block * lanes, channels, row);
        };
        compute_slab(conv, weights, x, slab, pools, code != nullptr, row, finish);
    });
}

}  // namespace
}  // namespace pvc
