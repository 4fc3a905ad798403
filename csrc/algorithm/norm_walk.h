// How the memory of a normalization is walked: forward and backward are one pass for sums and one that writes.
//
// Memory is read as rows of `columns` vectors, the shortest that hold whole voxels, with constants per lane. A sample
// is cut into chunks of rows; sums of chunks are added in order, so which thread summed what changes no bit.
#pragma once

#include "../arena.h"
#include "../instance_norm.h"
#include "../parallel.h"
#include "../vector.h"

namespace pvc {
namespace {

constexpr int64_t kNormChunk = 16 * 1024;    // elements
constexpr int64_t kNormRows = 32;            // rows of a chunk at least: else its sums are as much memory as it is
constexpr int64_t kNormBlock = 4 * 1024;     // elements of which a column at a time is summed: they stay in L1
constexpr int64_t kNormSerial = 16 * 1024;   // elements that are not worth waking other threads for
constexpr int64_t kNormPlanesPerThread = 4;  // from so many groups on each is one thread's, while it is in its cache
constexpr int64_t kNormAhead = 8 * 1024;     // bytes between what is read and what is asked for
constexpr int64_t kNormStreamed = 16 << 20;  // bytes of a result from which on it is written past the caches

inline void ask_for_line_ahead_of(const void* address) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + kNormAhead));
}

// Writes of vectors that are all aligned, to a result that is to go past the caches or not.
template <bool Stream, typename T>
inline void store_normalized(T* to, typename Vector<T>::type value) {
    if constexpr (Stream) {
        Vector<T>::stream(to, value);
    } else {
        Vector<T>::store(to, value);
    }
}

template <typename T>
bool goes_past_caches(const InstanceNormProblem& problem, const T* result) {
    const int64_t elements = problem.samples * problem.voxels * problem.channels;
    // Every sample begins at a vector.
    const bool aligned = reinterpret_cast<uintptr_t>(result) % PVC_VECTOR_BYTES == 0 &&
                         (problem.samples == 1 || problem.voxels * problem.channels % Vector<T>::lanes == 0);
    return kStreams && aligned && elements * static_cast<int64_t>(sizeof(T)) >= kNormStreamed;
}

// The lanes of a vector as doubles.
template <typename T>
struct Doubles {
    using type = Vector<double>::type;
    static constexpr int parts = static_cast<int>(sizeof(double) / sizeof(T)), lanes = Vector<double>::lanes;
    typedef T narrow __attribute__((vector_size(PVC_VECTOR_BYTES / parts)));
    typedef T unaligned __attribute__((vector_size(PVC_VECTOR_BYTES / parts), aligned(sizeof(T)), may_alias));

    static inline type load(const T* from, int part) {
        return __builtin_convertvector(*reinterpret_cast<const unaligned*>(from + part * lanes), type);
    }

    static inline type of(typename Vector<T>::type value, int part) {
        narrow piece;
        std::memcpy(&piece, reinterpret_cast<const char*>(&value) + part * sizeof(piece), sizeof(piece));
        return __builtin_convertvector(piece, type);
    }
};

// How the memory of a sample is walked.
template <typename T>
struct NormWalk {
    static constexpr int lanes = Vector<T>::lanes;
    int64_t channels, columns, row, rows, rest, rows_per_chunk, chunks;

    explicit NormWalk(const InstanceNormProblem& problem) : channels(problem.channels) {
        int64_t divisor = lanes;  // a power of two
        while (channels % divisor != 0) divisor /= 2;
        columns = channels / divisor;
        row = columns * lanes;
        rows = problem.voxels * channels / row;
        rest = problem.voxels * channels % row;
        rows_per_chunk = kNormChunk / row > kNormRows ? kNormChunk / row : kNormRows;
        chunks = rows > rows_per_chunk ? (rows + rows_per_chunk - 1) / rows_per_chunk : 1;
    }

    int64_t first_row(int64_t chunk) const { return chunk * rows_per_chunk; }
    int64_t end_row(int64_t chunk) const {
        return first_row(chunk) + rows_per_chunk < rows ? first_row(chunk) + rows_per_chunk : rows;
    }
    // Elements behind the last whole row.
    int64_t rest_of(int64_t chunk) const { return chunk == chunks - 1 ? rest : 0; }

    // One value per channel, `period` apart from the next, as one value per lane of a row.
    template <typename From>
    void spread(const From* values, T* lanes_of_row) const {
        if (channels == 1) {
            for (int64_t i = 0; i < row; ++i) lanes_of_row[i] = static_cast<T>(values[0]);
            return;
        }
        for (int64_t i = 0; i < row; i += channels) {
            for (int64_t c = 0; c < channels; ++c) lanes_of_row[i + c] = static_cast<T>(values[c]);
        }
    }

    // Calls sum(column, first row, number of rows) so that neighbouring columns find their rows in L1.
    template <typename Sum>
    void by_columns(int64_t chunk, const Sum& sum) const {
        const int64_t end = end_row(chunk);
        const int64_t step = columns == 1 ? rows_per_chunk : (kNormBlock / row > 8 ? kNormBlock / row : 8);
        for (int64_t r = first_row(chunk); r < end; r += step) {
            const int64_t count = r + step < end ? step : end - r;
            for (int64_t j = 0; j < columns; ++j) sum(j, r, count);
        }
    }
};

// Elements `from[0 .. count)` and the rest of a vector from `filling`, where a whole vector can be read.
template <typename T>
inline void load_rest(const T* from, int64_t count, const T* filling, T* to) {
    std::memcpy(to, filling, sizeof(T) * Vector<T>::lanes);
    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(count));
}

inline int64_t rest_in_column(int64_t rest, int64_t column, int64_t lanes) {
    const int64_t count = rest - column * lanes;
    return count < 0 ? 0 : (count < lanes ? count : lanes);
}

// Adds lanes of a row up by channel: `sums` is [Count][row], `by_channel` [Count][channels].
template <int Count, typename T>
void fold(const NormWalk<T>& walk, const double* sums, double* by_channel) {
    for (int k = 0; k < Count; ++k) {
        for (int64_t c = 0; c < walk.channels; ++c) by_channel[k * walk.channels + c] = 0;
        for (int64_t i = 0; i < walk.row; i += walk.channels) {
            for (int64_t c = 0; c < walk.channels; ++c) {
                by_channel[k * walk.channels + c] += sums[k * walk.row + i + c];
            }
        }
    }
}

// Adds the sums of a sample's chunks, [chunks][count], to `totals`, in order.
template <typename T>
void add_chunks(const NormWalk<T>& walk, const double* of_chunks, int64_t count, double* totals) {
    for (int64_t chunk = 0; chunk < walk.chunks; ++chunk, of_chunks += count) {
        for (int64_t i = 0; i < count; ++i) totals[i] += of_chunks[i];
    }
}

// Calls body(task) for [0, tasks) of `elements` each. Neighbours write to the same cache lines: as many as make a chunk
// are one thread's.
template <typename Body>
void parallel_for_neighbours(int64_t tasks, int64_t elements, const Body& body) {
    const int64_t each = elements < kNormChunk ? kNormChunk / elements : 1;
    parallel_for((tasks + each - 1) / each, [&](int64_t block) {
        const int64_t end = (block + 1) * each < tasks ? (block + 1) * each : tasks;
        for (int64_t task = block * each; task < end; ++task) body(task);
    });
}

// Every sample is prepared and its chunks reduced, then each group of samples that share statistics combined, then
// every chunk applied.
template <typename T, typename Prepare, typename Reduce, typename Combine, typename Apply>
void in_two_passes(const InstanceNormProblem& problem, const NormWalk<T>& walk, const Prepare& prepare,
                   const Reduce& reduce, const Combine& combine, const Apply& apply) {
    const int64_t elements = problem.samples * problem.voxels * problem.channels;
    const int64_t groups = problem.groups();
    const auto group_at_once = [&](int64_t group) {
        for (int64_t sample = group; sample < problem.samples; sample += groups) {
            prepare(sample);
            for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) reduce(sample, chunk);
        }
        combine(group);
        // Backwards: what was read last is still in the cache.
        for (int64_t sample = problem.samples - groups + group; sample >= 0; sample -= groups) {
            for (int64_t chunk = walk.chunks - 1; chunk >= 0; --chunk) apply(sample, chunk);
        }
    };
    // Samples of a group are not neighbours: short ones are read in the order of memory.
    const bool in_order = problem.sharing > 1 && problem.voxels * problem.channels < kNormChunk / 2;
    if (elements <= kNormSerial) {
        for (int64_t group = 0; group < groups; ++group) group_at_once(group);
    } else if (groups >= kNormPlanesPerThread * omp_get_max_threads() && !in_order) {
        parallel_for_neighbours(groups, elements / groups, group_at_once);
    } else {
        const int64_t tasks = problem.samples * walk.chunks, each = elements / tasks;
        for (int64_t sample = 0; sample < problem.samples; ++sample) prepare(sample);
        parallel_for_neighbours(tasks, each, [&](int64_t task) { reduce(task / walk.chunks, task % walk.chunks); });
        parallel_for_neighbours(groups, problem.sharing * walk.chunks * walk.channels, combine);
        parallel_for_neighbours(tasks, each, [&](int64_t task) {
            const int64_t reversed = tasks - 1 - task;
            apply(reversed / walk.chunks, reversed % walk.chunks);
        });
    }
}

// Calls body(column's constants, offset of a vector) for the whole vectors of a chunk, and rest(constants, offset,
// count) for parts of vectors behind them. `constants` makes what body takes of a column.
template <typename T, typename Constants, typename Body, typename Rest>
inline void for_each_vector(const NormWalk<T>& walk, int64_t chunk, const Constants& constants, const Body& body,
                            const Rest& rest) {
    constexpr int lanes = Vector<T>::lanes;
    const int64_t begin = walk.first_row(chunk) * walk.row, end = walk.end_row(chunk) * walk.row;
    if (walk.columns == 1) {
        const auto of_all = constants(0);
        for (int64_t i = begin; i < end; i += lanes) body(of_all, i);
    } else {
        for (int64_t r = begin; r < end; r += walk.row) {
            for (int64_t j = 0; j < walk.columns; ++j) body(constants(j * lanes), r + j * lanes);
        }
    }
    for (int64_t j = 0; j < walk.columns; ++j) {
        const int64_t count = rest_in_column(walk.rest_of(chunk), j, lanes);
        if (count == 0) break;
        rest(constants(j * lanes), walk.rows * walk.row + j * lanes, count);
    }
}

}  // namespace
}  // namespace pvc
