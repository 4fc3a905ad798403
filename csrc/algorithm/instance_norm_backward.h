// The gradients of instance normalization and the activation behind it (norm_plane.h).
#pragma once

#include "norm_plane.h"

namespace pvc {
namespace {

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

// dx = scale h + (x - hi) by_x + constant, the last two of each lane of a row.
template <NormActivation A, bool Stream, typename T>
void write_gradient(const NormWalk<T>& walk, int64_t chunk, const RowConstants<T>& row, const T* by_x,
                    const T* constant, const T* grad, const T* x, T* grad_input) {
    using V = Vector<T>;
    using vector = typename V::type;
    struct Column {
        vector hi, scale, shift, slope, by_x, constant;
    };
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
    double* sums = partials + partials_size;                 // of planes: db, dw, dslope
    constexpr int kConstants = RowConstants<T>::kCount + 2;  // and `by_x`, `constant`
    T* constants = scratch<T>(Scratch::shared_weights, problem.samples * kConstants * walk.row);
    const auto row_of = [&](int64_t sample) {
        return RowConstants<T>(walk, constants + sample * kConstants * walk.row);
    };
    const auto by_x_of = [&](int64_t sample) { return row_of(sample).slope + walk.row; };
    const auto partial = [&](int64_t sample, int64_t chunk) {
        return partials + (sample * walk.chunks + chunk) * kSums * walk.channels;
    };
    in_two_passes(
        problem, walk,
        [&](int64_t sample) { row_of(sample).make(problem, walk, sample, weight, bias, slopes, statistics); },
        [&](int64_t sample, int64_t chunk) {
            const RowConstants<T> row = row_of(sample);
            sum_for_gradients<A, Slopes>(walk, chunk, row, grad_output + sample * sample_size, x + sample * sample_size,
                                         partial(sample, chunk));
        },
        [&](int64_t group) {
            const double share = 1.0 / static_cast<double>(problem.voxels * problem.sharing);
            T* by_channel = scratch<T>(Scratch::tile_input, 2 * walk.channels);
            double* totals = scratch<double>(Scratch::tile_accumulators, kSums * walk.channels);
            for (int64_t i = 0; i < kSums * walk.channels; ++i) totals[i] = 0;
            for (int64_t sample = group; sample < problem.samples; sample += problem.groups()) {
                add_chunks(walk, partial(sample, 0), kSums * walk.channels, totals);
            }
            for (int64_t c = 0; c < walk.channels; ++c) {
                double total[kSums];
                for (int k = 0; k < kSums; ++k) total[k] = totals[k * walk.channels + c];
                const int64_t first = group * walk.channels + c;
                const PlaneConstants<T> plane =
                    constants_of(problem, first, first % problem.parameters, weight, bias, statistics);
                const double inverse = statistics[planes + first], scale = static_cast<double>(plane.scale);
                total[1] -= plane.lo * total[0];
                const double by_x = -scale * inverse * inverse * total[1] * share;
                by_channel[c] = static_cast<T>(by_x);
                by_channel[walk.channels + c] = static_cast<T>(-scale * total[0] * share - by_x * plane.lo);
                total[1] *= inverse;
                for (int64_t sample = group; sample < problem.samples; sample += problem.groups()) {
                    for (int k = 0; k < kSums; ++k) {
                        sums[k * planes + sample * walk.channels + c] = sample == group ? total[k] : 0;
                    }
                }
            }
            for (int64_t sample = group; sample < problem.samples; sample += problem.groups()) {
                walk.spread(by_channel, by_x_of(sample));
                walk.spread(by_channel + walk.channels, by_x_of(sample) + walk.row);
            }
        },
        [&](int64_t sample, int64_t chunk) {
            if (grad_input == nullptr) return;
            const RowConstants<T> row = row_of(sample);
            const T* by_x = by_x_of(sample);
            const auto run = past_caches ? write_gradient<A, true, T> : write_gradient<A, false, T>;
            run(walk, chunk, row, by_x, by_x + walk.row, grad_output + sample * sample_size, x + sample * sample_size,
                grad_input + sample * sample_size);
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
