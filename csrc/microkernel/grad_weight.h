// Microkernels of the weight gradient: a register tile of MR rows x NR column vectors, summed over output voxels.
//
//   outer:  tile[m][n] += rows[m] * columns[n]    a row is one value, broadcast; a column is one vector
//   lanes:  tile[m][n] += rows[m] * columns[n]    both are vectors, multiplied lane by lane
//
// One operand is the output gradient, the other the zero-padded input; which is which, and what the lanes run over, is
// the plan's business (algorithm/direct_grad_weight_plan.h). Rows and columns are offsets from two pointers that walk
// over the voxels in step, so the taps of a kernel are the same buffer at other offsets. The tile stays in registers
// over a whole run of voxels and is added to memory once at its end.
//
// A voxel costs MR * NR FMAs and MR + NR loads. With two of each per cycle and an FMA latency of 4 cycles, a tile of
// at least 8 vectors and two rows or columns runs at the FMA peak. Loads that are not free cost a little besides (they
// miss the cache or cross its lines); `tile_cost` is that model.
#pragma once

#include "../isa.h"
#include "../vector.h"

namespace pvc {
namespace {

// Output voxels that one tile is summed over. Steps are in elements, per axis (depth, height, width).
struct VoxelRun {
    int64_t extent[3];
    int64_t row_step[3];
    int64_t column_step[3];
    int64_t voxels;  // in all
    // lanes kernels whose lanes run along the width: extent[2] counts whole vectors and `tail` the voxels after them
    int64_t tail;
};

enum class GradWeightKernel { outer, lanes };

template <typename T>
using GradWeightTile = void (*)(const VoxelRun& run, const T* rows, const int64_t* row_offsets, const T* columns,
                                const int64_t* column_offsets, T* tile);

constexpr int kMaxTileRows = 10;    // each row holds its offset in a general register
constexpr int kMaxTileColumns = 9;  // likewise

// Most rows of a tile with so many columns, 0 if there is no such tile: accumulators, a vector per column and one row
// value share the vector registers. The lanes kernel takes its columns from memory, so only one row may be wide.
constexpr int max_tile_rows(GradWeightKernel kernel, int columns) {
    if (kernel == GradWeightKernel::lanes) return columns > kMaxTileColumns ? 0 : columns > 5 ? 1 : columns > 3 ? 2 : 4;
    const int rows = (kVectorRegisters - 1 - columns) / columns;
    return columns > 4 || rows < 3 ? 0 : rows > kMaxTileRows ? kMaxTileRows : rows;
}

// Sixteenths of a cycle per voxel.
constexpr int64_t tile_cost(int64_t rows, int64_t columns) {
    const int64_t loads = rows + columns, operations = rows * columns > loads ? rows * columns : loads;
    return (operations > 8 ? operations : 8) * 8 + loads;
}

template <typename T, int MR, int NR>
inline void add_tile(const typename Vector<T>::type (&sum)[MR][NR], T* tile) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < NR; ++n) {
            T* at = tile + (m * NR + n) * Vector<T>::lanes;
            Vector<T>::store(at, Vector<T>::load(at) + sum[m][n]);
        }
    }
}

template <typename T, int MR, int NR>
void outer_tile(const VoxelRun& run, const T* rows, const int64_t* row_offsets, const T* columns,
                const int64_t* column_offsets, T* tile) {
    using V = Vector<T>;
    typename V::type sum[MR][NR] = {};
    int64_t row_offset[MR], column_offset[NR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) row_offset[m] = row_offsets[m];
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n) column_offset[n] = column_offsets[n];

    for (int64_t d = 0; d < run.extent[0]; ++d) {
        for (int64_t h = 0; h < run.extent[1]; ++h) {
            const T* row = rows + d * run.row_step[0] + h * run.row_step[1];
            const T* column = columns + d * run.column_step[0] + h * run.column_step[1];
            const int64_t row_step = run.row_step[2], column_step = run.column_step[2];
            for (int64_t w = run.extent[2]; w > 0; --w) {
                typename V::type vector[NR];
#pragma GCC unroll 16
                for (int n = 0; n < NR; ++n) vector[n] = V::load(column + column_offset[n]);
#pragma GCC unroll 16
                for (int m = 0; m < MR; ++m) {
                    const T value = row[row_offset[m]];
#pragma GCC unroll 16
                    for (int n = 0; n < NR; ++n) sum[m][n] += value * vector[n];
                }
                row += row_step;
                column += column_step;
            }
        }
    }
    add_tile<T, MR, NR>(sum, tile);
}

// Bits of a vector: none in the first half of the table, all in the second. Loaded at `tail`, it keeps the last lanes.
template <typename T>
struct TailMask;
template <>
struct TailMask<float> {
    typedef int32_t bits;
};
template <>
struct TailMask<double> {
    typedef int64_t bits;
};

// The last `tail` lanes of `value`, zero in the others.
template <typename T>
inline typename Vector<T>::type keep_last(typename Vector<T>::type value, int64_t tail) {
    using Bits = typename TailMask<T>::bits;
    typedef Bits BitVector __attribute__((vector_size(PVC_VECTOR_BYTES)));
    constexpr int lanes = Vector<T>::lanes;
    struct Table {
        Bits bits[2 * lanes];
        constexpr Table() : bits() {
            for (int i = 0; i < lanes; ++i) bits[lanes + i] = -1;
        }
    };
    static constexpr Table table;
    BitVector mask;
    __builtin_memcpy(&mask, table.bits + tail, sizeof(mask));
    return (typename Vector<T>::type)((BitVector)value & mask);
}

// One vector of voxels; `keep` is applied to the rows. The side with fewer vectors stays in registers.
template <typename T, int MR, int NR, typename Keep>
inline void add_lanes(const T* row, const int64_t (&row_offset)[MR], const T* column,
                      const int64_t (&column_offset)[NR], const Keep& keep, typename Vector<T>::type (&sum)[MR][NR]) {
    using V = Vector<T>;
    if constexpr (MR < NR) {
        typename V::type value[MR];
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) value[m] = keep(V::load(row + row_offset[m]));
#pragma GCC unroll 16
        for (int n = 0; n < NR; ++n) {
            const typename V::type vector = V::load(column + column_offset[n]);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) sum[m][n] += value[m] * vector;
        }
    } else {
        typename V::type vector[NR];
#pragma GCC unroll 16
        for (int n = 0; n < NR; ++n) vector[n] = V::load(column + column_offset[n]);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            const typename V::type value = keep(V::load(row + row_offset[m]));
#pragma GCC unroll 16
            for (int n = 0; n < NR; ++n) sum[m][n] += value * vector[n];
        }
    }
}

template <typename T, int MR, int NR>
void lanes_tile(const VoxelRun& run, const T* rows, const int64_t* row_offsets, const T* columns,
                const int64_t* column_offsets, T* tile) {
    using V = Vector<T>;
    typename V::type sum[MR][NR] = {};
    int64_t row_offset[MR], column_offset[NR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) row_offset[m] = row_offsets[m];
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n) column_offset[n] = column_offsets[n];
    const int64_t tail = run.tail;

    for (int64_t d = 0; d < run.extent[0]; ++d) {
        for (int64_t h = 0; h < run.extent[1]; ++h) {
            const T* row = rows + d * run.row_step[0] + h * run.row_step[1];
            const T* column = columns + d * run.column_step[0] + h * run.column_step[1];
            const int64_t row_step = run.row_step[2], column_step = run.column_step[2];
            for (int64_t w = run.extent[2]; w > 0; --w) {
                const auto keep_all = [](typename V::type value) { return value; };
                add_lanes<T, MR, NR>(row, row_offset, column, column_offset, keep_all, sum);
                row += row_step;
                column += column_step;
            }
            if (tail) {  // the last vector of the row again, without the voxels that are already summed
                const auto keep_tail = [tail](typename V::type value) { return keep_last<T>(value, tail); };
                const int64_t back = tail - V::lanes;
                add_lanes<T, MR, NR>(row + back, row_offset, column + back, column_offset, keep_tail, sum);
            }
        }
    }
    add_tile<T, MR, NR>(sum, tile);
}

// The tile kernel of `rows` x `columns`, filled at compile time for every size that max_tile_rows allows.
template <typename T>
struct GradWeightTiles {
    GradWeightTile<T> outer[kMaxTileColumns + 1][kMaxTileRows + 1];
    GradWeightTile<T> lanes[kMaxTileColumns + 1][kMaxTileRows + 1];

    constexpr GradWeightTiles() : outer(), lanes() { fill_columns<1>(); }

    template <int NR>
    constexpr void fill_columns() {
        if constexpr (NR <= kMaxTileColumns) {
            fill_rows<NR, 1>();
            fill_columns<NR + 1>();
        }
    }

    template <int NR, int MR>
    constexpr void fill_rows() {
        if constexpr (MR <= kMaxTileRows) {
            if constexpr (MR <= max_tile_rows(GradWeightKernel::outer, NR)) outer[NR][MR] = outer_tile<T, MR, NR>;
            if constexpr (MR <= max_tile_rows(GradWeightKernel::lanes, NR)) lanes[NR][MR] = lanes_tile<T, MR, NR>;
            fill_rows<NR, MR + 1>();
        }
    }
};

template <typename T>
constexpr GradWeightTiles<T> grad_weight_tiles;

template <typename T>
inline GradWeightTile<T> grad_weight_tile(GradWeightKernel kernel, int64_t rows, int64_t columns) {
    const auto& table = kernel == GradWeightKernel::outer ? grad_weight_tiles<T>.outer : grad_weight_tiles<T>.lanes;
    return table[columns][rows];
}

}  // namespace
}  // namespace pvc
