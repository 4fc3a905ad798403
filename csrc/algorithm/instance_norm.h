// Instance normalization and the activation behind it, forward and backward.
//
// Over the V voxels of a plane (a channel of a sample), with weight w, bias b, and f the activation,
//
//     m = mean(x)    r = 1 / sqrt(mean((x - m)^2) + eps)    z = (x - m) r w + b    y = f(z)
//
// and, for the gradient g of y and h = g f'(z), which is made anew from x and never stored,
//
//     dx = w r (h - S1 / V - (x - m) r^2 S2 / V)    S1 = sum(h)    S2 = sum(h (x - m))    dw = r S2    db = S1
//
// so forward and backward are one pass for sums and one that writes. All sums are of doubles, and of differences from a
// value of the plane: from its first voxel for the statistics, whose distance from the mean enters the variance itself
// and so cannot exceed it more than V times; from m, rounded to T, afterwards, where what rounding took from m goes
// into the constants. So a mean of many deviations costs nothing but its own rounding in x.
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
constexpr int64_t kNormBlock = 4 * 1024;     // elements of which a column at a time is summed: they stay in L1
constexpr int64_t kNormSerial = 16 * 1024;   // elements that are not worth waking other threads for
constexpr int64_t kNormPlanesPerThread = 4;  // from so many samples on each is one thread's, while it is in its cache
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

enum class NormActivation { none, relu, slope };

// h of one vector, from z and g.
template <NormActivation A, typename T>
inline typename Vector<T>::type through_activation(typename Vector<T>::type z, typename Vector<T>::type grad,
                                                   typename Vector<T>::type slope) {
    if constexpr (A == NormActivation::relu) return z <= T(0) ? typename Vector<T>::type{} : grad;
    if constexpr (A == NormActivation::slope) return z > T(0) ? grad : grad * slope;
    return grad;
}

template <NormActivation A, typename T>
inline typename Vector<T>::type norm_activation(typename Vector<T>::type z, typename Vector<T>::type slope) {
    return through_activation<A, T>(z, z, slope);
}

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
        rows_per_chunk = kNormChunk / row > 1 ? kNormChunk / row : 1;
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

// Every chunk is reduced, then each sample combined, then every chunk applied.
template <typename T, typename Reduce, typename Combine, typename Apply>
void in_two_passes(const InstanceNormProblem& problem, const NormWalk<T>& walk, const Reduce& reduce,
                   const Combine& combine, const Apply& apply) {
    const int64_t elements = problem.samples * problem.voxels * problem.channels;
    const auto sample_at_once = [&](int64_t sample) {
        for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) reduce(sample, chunk);
        combine(sample);
        // Backwards: what was read last is still in the cache.
        for (int64_t chunk = walk.chunks - 1; chunk >= 0; --chunk) apply(sample, chunk);
    };
    if (elements <= kNormSerial) {
        for (int64_t sample = 0; sample < problem.samples; ++sample) sample_at_once(sample);
    } else if (problem.samples >= kNormPlanesPerThread * omp_get_max_threads()) {
        parallel_for(problem.samples, sample_at_once);
    } else {
        const int64_t tasks = problem.samples * walk.chunks;
        parallel_for(tasks, [&](int64_t task) { reduce(task / walk.chunks, task % walk.chunks); });
        parallel_for(problem.samples, combine);
        parallel_for(tasks, [&](int64_t task) {
            const int64_t reversed = tasks - 1 - task;
            apply(reversed / walk.chunks, reversed % walk.chunks);
        });
    }
}

// The constants of a plane, with m as hi + lo: z = (x - hi) scale + shift.
template <typename T>
struct PlaneConstants {
    T hi, scale, shift;
    double lo;

    PlaneConstants(double mean, double inverse_deviation, double weight, double bias) {
        hi = static_cast<T>(mean);
        lo = mean - static_cast<double>(hi);
        scale = static_cast<T>(inverse_deviation * weight);
        shift = static_cast<T>(bias - lo * static_cast<double>(scale));
    }
};

template <typename T>
PlaneConstants<T> constants_of(const InstanceNormProblem& problem, int64_t plane, const T* weight, const T* bias,
                               const double* statistics) {
    const int64_t planes = problem.samples * problem.channels, parameter = plane % problem.parameters;
    return {statistics[plane], statistics[planes + plane],
            weight == nullptr ? 1.0 : static_cast<double>(weight[parameter]),
            bias == nullptr ? 0.0 : static_cast<double>(bias[parameter])};
}

template <typename T>
T slope_of(const InstanceNormProblem& problem, int64_t plane, const T* slopes) {
    if (slopes == nullptr) return static_cast<T>(problem.negative_slope);
    return slopes[problem.slopes == 1 ? 0 : plane % problem.parameters];
}

// hi, scale, shift and slope for each lane of a row of a sample, in this thread's scratch memory.
template <typename T>
struct RowConstants {
    T *hi, *scale, *shift, *slope;

    RowConstants(const InstanceNormProblem& problem, const NormWalk<T>& walk, int64_t sample, const T* weight,
                 const T* bias, const T* slopes, const double* statistics) {
        T* space = scratch<T>(Scratch::tile_input, 4 * walk.row + 4 * walk.channels);
        hi = space, scale = hi + walk.row, shift = scale + walk.row, slope = shift + walk.row;
        T* by_channel = slope + walk.row;
        for (int64_t c = 0; c < walk.channels; ++c) {
            const int64_t plane = sample * walk.channels + c;
            const PlaneConstants<T> constants = constants_of(problem, plane, weight, bias, statistics);
            by_channel[c] = constants.hi;
            by_channel[walk.channels + c] = constants.scale;
            by_channel[2 * walk.channels + c] = constants.shift;
            by_channel[3 * walk.channels + c] = slope_of(problem, plane, slopes);
        }
        for (int k = 0; k < 4; ++k) walk.spread(by_channel + k * walk.channels, space + k * walk.row);
    }
};

// Sums of x - x0 and of its square, [2][channels], x0 the first voxel of the sample.
template <typename T>
void sum_for_statistics(const NormWalk<T>& walk, int64_t chunk, const T* x, double* by_channel) {
    using D = Doubles<T>;
    using V = Vector<T>;
    T* first = scratch<T>(Scratch::tile_input, walk.row);
    double* sums = scratch<double>(Scratch::tile_accumulators, 2 * walk.row);
    walk.spread(x, first);
    for (int64_t i = 0; i < 2 * walk.row; ++i) sums[i] = 0;
    const auto add = [&](const T* from, int64_t column, int64_t rows) {
        Vector<double>::type origin[D::parts], sum[D::parts] = {}, squares[D::parts] = {};
        for (int p = 0; p < D::parts; ++p) origin[p] = D::load(first + column * V::lanes, p);
        for (int64_t r = 0; r < rows; ++r) {
            ask_for_line_ahead_of(from + r * walk.row);
            for (int p = 0; p < D::parts; ++p) {
                const Vector<double>::type d = D::load(from + r * walk.row, p) - origin[p];
                sum[p] += d;
                squares[p] += d * d;
            }
        }
        for (int p = 0; p < D::parts; ++p) {
            double* to = sums + column * V::lanes + p * D::lanes;
            Vector<double>::store(to, Vector<double>::load(to) + sum[p]);
            Vector<double>::store(to + walk.row, Vector<double>::load(to + walk.row) + squares[p]);
        }
    };
    walk.by_columns(chunk, [&](int64_t column, int64_t r, int64_t count) {
        add(x + r * walk.row + column * V::lanes, column, count);
    });
    T buffer[V::lanes];
    for (int64_t j = 0; j < walk.columns; ++j) {
        const int64_t count = rest_in_column(walk.rest_of(chunk), j, V::lanes);
        if (count == 0) break;
        load_rest(x + walk.rows * walk.row + j * V::lanes, count, first + j * V::lanes, buffer);
        add(buffer, j, 1);
    }
    fold<2>(walk, sums, by_channel);
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

template <NormActivation A, bool Stream, typename T>
void normalize(const NormWalk<T>& walk, int64_t chunk, const RowConstants<T>& row, const T* x, T* y) {
    using V = Vector<T>;
    using vector = typename V::type;
    struct Column {
        vector hi, scale, shift, slope;
    };
    const auto constants = [&](int64_t lane) {
        return Column{V::load(row.hi + lane), V::load(row.scale + lane), V::load(row.shift + lane),
                      V::load(row.slope + lane)};
    };
    const auto of = [](const Column& c, vector value) {
        return norm_activation<A, T>((value - c.hi) * c.scale + c.shift, c.slope);
    };
    for_each_vector(
        walk, chunk, constants,
        [&](const Column& c, int64_t i) {
            ask_for_line_ahead_of(x + i);
            store_normalized<Stream>(y + i, of(c, V::load(x + i)));
        },
        [&](const Column& c, int64_t i, int64_t count) {
            V::store_partial(y + i, of(c, V::load_partial(x + i, count)), count);
        });
    if constexpr (Stream) V::finish_stream();
}

// Sums of h, of h (x - hi), and for PReLU of what its weights multiplied, g z where z is not positive: [3][channels].
template <NormActivation A, bool Slopes, typename T>
void sum_for_gradients(const NormWalk<T>& walk, int64_t chunk, const RowConstants<T>& row, const T* grad, const T* x,
                       double* by_channel) {
    using D = Doubles<T>;
    using V = Vector<T>;
    using vector = typename V::type;
    constexpr int kSums = Slopes ? 3 : 2;
    double* sums = scratch<double>(Scratch::tile_accumulators, kSums * walk.row);
    for (int64_t i = 0; i < kSums * walk.row; ++i) sums[i] = 0;
    const auto add = [&](const T* from, const T* grads, int64_t column, int64_t rows) {
        const int64_t lane = column * V::lanes;
        const vector hi = V::load(row.hi + lane), scale = V::load(row.scale + lane), shift = V::load(row.shift + lane),
                     slope = V::load(row.slope + lane);
        Vector<double>::type sum[kSums][D::parts] = {};
        for (int64_t r = 0; r < rows; ++r) {
            ask_for_line_ahead_of(from + r * walk.row);
            ask_for_line_ahead_of(grads + r * walk.row);
            const vector d = V::load(from + r * walk.row) - hi, z = d * scale + shift;
            const vector g = V::load(grads + r * walk.row), h = through_activation<A, T>(z, g, slope);
            for (int p = 0; p < D::parts; ++p) {
                sum[0][p] += D::of(h, p);
                sum[1][p] += D::of(h, p) * D::of(d, p);
            }
            if constexpr (Slopes) {
                const vector below = z > T(0) ? vector{} : g * z;
                for (int p = 0; p < D::parts; ++p) sum[2][p] += D::of(below, p);
            }
        }
        for (int k = 0; k < kSums; ++k) {
            for (int p = 0; p < D::parts; ++p) {
                double* to = sums + k * walk.row + lane + p * D::lanes;
                Vector<double>::store(to, Vector<double>::load(to) + sum[k][p]);
            }
        }
    };
    walk.by_columns(chunk, [&](int64_t column, int64_t r, int64_t count) {
        const int64_t offset = r * walk.row + column * V::lanes;
        add(x + offset, grad + offset, column, count);
    });
    T values[V::lanes], grads[V::lanes];
    const T zeros[V::lanes] = {};
    for (int64_t j = 0; j < walk.columns; ++j) {
        const int64_t count = rest_in_column(walk.rest_of(chunk), j, V::lanes);
        if (count == 0) break;
        const int64_t offset = walk.rows * walk.row + j * V::lanes;
        load_rest(x + offset, count, row.hi + j * V::lanes, values);
        load_rest(grad + offset, count, zeros, grads);
        add(values, grads, j, 1);
    }
    fold<kSums>(walk, sums, by_channel);
}

// dx = scale h + (x - hi) by_x + constant, the last two [2][channels].
template <NormActivation A, bool Stream, typename T>
void write_gradient(const NormWalk<T>& walk, int64_t chunk, const RowConstants<T>& row, const T* by_channel,
                    const T* grad, const T* x, T* grad_input) {
    using V = Vector<T>;
    using vector = typename V::type;
    struct Column {
        vector hi, scale, shift, slope, by_x, constant;
    };
    T* by_x = scratch<T>(Scratch::tile_output, 2 * walk.row);
    T* constant = by_x + walk.row;
    walk.spread(by_channel, by_x);
    walk.spread(by_channel + walk.channels, constant);
    const auto constants = [&](int64_t lane) {
        return Column{V::load(row.hi + lane),    V::load(row.scale + lane), V::load(row.shift + lane),
                      V::load(row.slope + lane), V::load(by_x + lane),      V::load(constant + lane)};
    };
    const auto of = [](const Column& c, vector value, vector g) {
        const vector d = value - c.hi;
        return through_activation<A, T>(d * c.scale + c.shift, g, c.slope) * c.scale + (d * c.by_x + c.constant);
    };
    for_each_vector(
        walk, chunk, constants,
        [&](const Column& c, int64_t i) {
            ask_for_line_ahead_of(x + i);
            ask_for_line_ahead_of(grad + i);
            store_normalized<Stream>(grad_input + i, of(c, V::load(x + i), V::load(grad + i)));
        },
        [&](const Column& c, int64_t i, int64_t count) {
            V::store_partial(grad_input + i, of(c, V::load_partial(x + i, count), V::load_partial(grad + i, count)),
                             count);
        });
    if constexpr (Stream) V::finish_stream();
}

template <NormActivation A, typename T>
void instance_norm_forward_as(const InstanceNormProblem& problem, const T* x, const T* weight, const T* bias,
                              const T* slopes, T* y, double* statistics) {
    const NormWalk<T> walk(problem);
    const bool past_caches = goes_past_caches(problem, y);
    const int64_t sample_size = problem.voxels * problem.channels, planes = problem.samples * problem.channels;
    double* partials = scratch<double>(Scratch::shared_partials, problem.samples * walk.chunks * 2 * walk.channels);
    const auto partial = [&](int64_t sample, int64_t chunk) {
        return partials + (sample * walk.chunks + chunk) * 2 * walk.channels;
    };
    in_two_passes(
        problem, walk,
        [&](int64_t sample, int64_t chunk) {
            sum_for_statistics(walk, chunk, x + sample * sample_size, partial(sample, chunk));
        },
        [&](int64_t sample) {
            const double share = 1.0 / static_cast<double>(problem.voxels);
            for (int64_t c = 0; c < walk.channels; ++c) {
                double sum = 0, squares = 0;
                for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
                    sum += partial(sample, chunk)[c];
                    squares += partial(sample, chunk)[walk.channels + c];
                }
                const double distance = sum * share, variance = squares * share - distance * distance;
                const int64_t plane = sample * walk.channels + c;
                statistics[plane] = static_cast<double>(x[sample * sample_size + c]) + distance;
                statistics[planes + plane] = 1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + problem.eps);
            }
        },
        [&](int64_t sample, int64_t chunk) {
            const RowConstants<T> row(problem, walk, sample, weight, bias, slopes, statistics);
            const auto run = past_caches ? normalize<A, true, T> : normalize<A, false, T>;
            run(walk, chunk, row, x + sample * sample_size, y + sample * sample_size);
        });
}

template <NormActivation A, bool Slopes, typename T>
void instance_norm_backward_as(const InstanceNormProblem& problem, const T* grad_output, const T* x, const T* weight,
                               const T* bias, const T* slopes, const double* statistics, T* grad_input, T* grad_weight,
                               T* grad_bias, T* grad_slopes) {
    constexpr int kSums = Slopes ? 3 : 2;
    const NormWalk<T> walk(problem);
    const bool past_caches = goes_past_caches(problem, grad_input);
    const int64_t sample_size = problem.voxels * problem.channels, planes = problem.samples * problem.channels;
    const int64_t partials_size = problem.samples * walk.chunks * kSums * walk.channels;
    double* partials = scratch<double>(Scratch::shared_partials, partials_size + kSums * planes);
    double* sums = partials + partials_size;  // of planes: db, dw, dslope
    T* by_channel = scratch<T>(Scratch::shared_weights, 2 * planes);
    const auto partial = [&](int64_t sample, int64_t chunk) {
        return partials + (sample * walk.chunks + chunk) * kSums * walk.channels;
    };
    in_two_passes(
        problem, walk,
        [&](int64_t sample, int64_t chunk) {
            const RowConstants<T> row(problem, walk, sample, weight, bias, slopes, statistics);
            sum_for_gradients<A, Slopes>(walk, chunk, row, grad_output + sample * sample_size, x + sample * sample_size,
                                         partial(sample, chunk));
        },
        [&](int64_t sample) {
            const double share = 1.0 / static_cast<double>(problem.voxels);
            for (int64_t c = 0; c < walk.channels; ++c) {
                double total[kSums] = {};
                for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
                    for (int k = 0; k < kSums; ++k) total[k] += partial(sample, chunk)[k * walk.channels + c];
                }
                const int64_t plane = sample * walk.channels + c;
                const PlaneConstants<T> constants = constants_of(problem, plane, weight, bias, statistics);
                const double inverse = statistics[planes + plane], scale = static_cast<double>(constants.scale);
                total[1] -= constants.lo * total[0];
                const double by_x = -scale * inverse * inverse * total[1] * share;
                T* of_sample = by_channel + 2 * sample * walk.channels;
                of_sample[c] = static_cast<T>(by_x);
                of_sample[walk.channels + c] = static_cast<T>(-scale * total[0] * share - by_x * constants.lo);
                total[1] *= inverse;
                for (int k = 0; k < kSums; ++k) sums[k * planes + plane] = total[k];
            }
        },
        [&](int64_t sample, int64_t chunk) {
            if (grad_input == nullptr) return;
            const RowConstants<T> row(problem, walk, sample, weight, bias, slopes, statistics);
            const auto run = past_caches ? write_gradient<A, true, T> : write_gradient<A, false, T>;
            run(walk, chunk, row, by_channel + 2 * sample * walk.channels, grad_output + sample * sample_size,
                x + sample * sample_size, grad_input + sample * sample_size);
        });
    const auto add_up = [&](int which, T* result, int64_t count) {
        if (result == nullptr) return;
        for (int64_t i = 0; i < count; ++i) {
            double total = 0;
            for (int64_t plane = i; plane < planes; plane += count) total += sums[which * planes + plane];
            result[i] = static_cast<T>(total);
        }
    };
    add_up(0, grad_bias, problem.parameters);
    add_up(1, grad_weight, problem.parameters);
    if constexpr (Slopes) add_up(2, grad_slopes, problem.slopes);
}

template <typename T>
void instance_norm_forward(const InstanceNormProblem& problem, const T* x, const T* weight, const T* bias,
                           const T* slopes, T* y, double* statistics) {
    if (slopes != nullptr || problem.activation == Activation::leaky_relu) {
        instance_norm_forward_as<NormActivation::slope>(problem, x, weight, bias, slopes, y, statistics);
    } else if (problem.activation == Activation::relu) {
        instance_norm_forward_as<NormActivation::relu>(problem, x, weight, bias, slopes, y, statistics);
    } else {
        instance_norm_forward_as<NormActivation::none>(problem, x, weight, bias, slopes, y, statistics);
    }
}

template <typename T>
void instance_norm_backward(const InstanceNormProblem& problem, const T* grad_output, const T* x, const T* weight,
                            const T* bias, const T* slopes, const double* statistics, T* grad_input, T* grad_weight,
                            T* grad_bias, T* grad_slopes) {
    const auto run = [&](auto as) {
        as(problem, grad_output, x, weight, bias, slopes, statistics, grad_input, grad_weight, grad_bias, grad_slopes);
    };
    if (slopes != nullptr) {
        run(instance_norm_backward_as<NormActivation::slope, true, T>);
    } else if (problem.activation == Activation::leaky_relu) {
        run(instance_norm_backward_as<NormActivation::slope, false, T>);
    } else if (problem.activation == Activation::relu) {
        run(instance_norm_backward_as<NormActivation::relu, false, T>);
    } else {
        run(instance_norm_backward_as<NormActivation::none, false, T>);
    }
}

}  // namespace
}  // namespace pvc
