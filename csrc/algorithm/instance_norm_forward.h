// Instance normalization forward, with the activation behind it (norm_plane.h).
#pragma once

#include "norm_plane.h"
#include "transpose.h"

namespace pvc {
namespace {

// Sums of x - x0 and of its square, [2][channels], x0 the first voxel of the sample (`origin_of`).
template <typename T>
void sum_for_statistics(const NormWalk<T>& walk, int64_t chunk, const T* x, double* by_channel) {
    using D = Doubles<T>;
    using V = Vector<T>;
    T* first = scratch<T>(Scratch::tile_input, walk.row);
    double* sums = scratch<double>(Scratch::tile_accumulators, 2 * walk.row);
    walk.spread(x, first);
    for (int64_t i = 0; i < walk.row; ++i) first[i] = origin_of(first[i]);
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

// y[i] of the elements of a chunk.
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

// The same with the planes of y one after another.
template <NormActivation A, typename T>
void normalize_planar(const NormWalk<T>& walk, int64_t chunk, const RowConstants<T>& row, int64_t voxels, const T* x,
                      T* y, bool past_caches) {
    const int64_t begin = walk.first_row(chunk) * walk.row;
    const int64_t end = walk.end_row(chunk) * walk.row + walk.rest_of(chunk);
    T* values = scratch<T>(Scratch::tile_output, end - begin + Vector<T>::lanes);
    normalize<A, false>(walk, chunk, row, x, values - begin);
    const int64_t first = begin / walk.channels, count = (end - begin) / walk.channels;
    const auto write = past_caches ? transpose_past_caches<T> : transpose<T>;
    write(values, walk.channels, y + first, voxels, count, walk.channels);
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
    const auto origin = [&](int64_t sample, int64_t c) {
        return static_cast<double>(origin_of(x[sample * sample_size + c]));
    };
    constexpr int kConstants = RowConstants<T>::kCount;
    T* constants = scratch<T>(Scratch::shared_weights, problem.samples * kConstants * walk.row);
    const auto row_of = [&](int64_t sample) {
        return RowConstants<T>(walk, constants + sample * kConstants * walk.row);
    };
    in_two_passes(
        problem, walk, [](int64_t) {},
        [&](int64_t sample, int64_t chunk) {
            sum_for_statistics(walk, chunk, x + sample * sample_size, partial(sample, chunk));
        },
        [&](int64_t group) {
            const double voxels = static_cast<double>(problem.voxels);
            double* sum = scratch<double>(Scratch::tile_accumulators, 4 * walk.channels);
            double* squares = sum + walk.channels;
            // Of the planes so far: differences from the first one's origin, and squares of those from the mean.
            double *total = squares + walk.channels, *deviations = total + walk.channels, merged = 0;
            for (int64_t i = 0; i < 2 * walk.channels; ++i) total[i] = 0;
            for (int64_t sample = group; sample < problem.samples; sample += problem.groups(), ++merged) {
                for (int64_t i = 0; i < 2 * walk.channels; ++i) sum[i] = 0;
                add_chunks(walk, partial(sample, 0), 2 * walk.channels, sum);
                for (int64_t c = 0; c < walk.channels; ++c) {
                    // Squares of finite values may overflow: a variance that is infinite.
                    const bool overflows = squares[c] == __builtin_inf() && sum[c] - sum[c] == 0;
                    const double within = overflows ? squares[c] : squares[c] - sum[c] * sum[c] / voxels;
                    const double distance = (origin(sample, c) - origin(group, c)) * voxels + sum[c];
                    deviations[c] += within < 0 ? 0 : within;
                    if (merged > 0) {
                        const double between = (distance - total[c] / merged) / voxels;
                        deviations[c] += between * between * voxels * merged / (merged + 1);
                    }
                    total[c] += distance;
                }
            }
            for (int64_t c = 0; c < walk.channels; ++c) {
                const double variance = deviations[c] / (voxels * merged);
                for (int64_t sample = group; sample < problem.samples; sample += problem.groups()) {
                    double* of_plane = statistics + sample * walk.channels + c;
                    of_plane[0] = origin(group, c) + total[c] / (voxels * merged);
                    of_plane[planes] = 1.0 / __builtin_sqrt(variance + problem.eps);
                    of_plane[2 * planes] = variance;
                }
            }
            for (int64_t sample = group; sample < problem.samples; sample += problem.groups()) {
                row_of(sample).make(problem, walk, sample, weight, bias, slopes, statistics);
            }
        },
        [&](int64_t sample, int64_t chunk) {
            const RowConstants<T> row = row_of(sample);
            if (problem.planar_result) {
                normalize_planar<A>(walk, chunk, row, problem.voxels, x + sample * sample_size,
                                    y + sample * sample_size, past_caches);
                return;
            }
            const auto run = past_caches ? normalize<A, true, T> : normalize<A, false, T>;
            run(walk, chunk, row, x + sample * sample_size, y + sample * sample_size);
        });
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

}  // namespace
}  // namespace pvc
