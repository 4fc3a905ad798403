// Instance and batch normalization and the activation behind it: definition, and the constants of a plane.
//
// Over the V voxels that share statistics (of a channel of a sample; of all samples for batch normalization), with
// weight w, bias b, and f the activation,
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
// into the constants. So a mean of many deviations costs nothing but its own rounding in x. Planes that share
// statistics are merged by the difference of their means (Chan, Golub, LeVeque, "Updating formulae and a pairwise
// algorithm for computing sample variances", 1979).
#pragma once

#include "norm_walk.h"

namespace pvc {
namespace {

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
PlaneConstants<T> constants_of(const InstanceNormProblem& problem, int64_t plane, int64_t parameter, const T* weight,
                               const T* bias, const double* statistics) {
    const int64_t planes = problem.samples * problem.channels;
    return {statistics[plane], statistics[planes + plane],
            weight == nullptr ? 1.0 : static_cast<double>(weight[parameter]),
            bias == nullptr ? 0.0 : static_cast<double>(bias[parameter])};
}

// From which the differences of a channel's values are summed: one of them, but for infinity and NaN.
template <typename T>
inline T origin_of(T first) {
    return first - first == 0 ? first : T(0);
}

// What is multiplied with the lanes of a row: z = (x - hi) scale + shift, and f's slope.
template <typename T>
struct RowConstants {
    static constexpr int kCount = 4;
    T *hi, *scale, *shift, *slope;

    RowConstants(const NormWalk<T>& walk, T* space)
        : hi(space), scale(hi + walk.row), shift(scale + walk.row), slope(shift + walk.row) {}

    // Those of a sample.
    void make(const InstanceNormProblem& problem, const NormWalk<T>& walk, int64_t sample, const T* weight,
              const T* bias, const T* slopes, const double* statistics) const {
        T* by_channel = scratch<T>(Scratch::tile_input, kCount * walk.channels);
        const int64_t first = sample * walk.channels, first_parameter = first % problem.parameters;
        for (int64_t c = 0; c < walk.channels; ++c) {
            const int64_t parameter = first_parameter + c;
            const PlaneConstants<T> constants = constants_of(problem, first + c, parameter, weight, bias, statistics);
            by_channel[c] = constants.hi;
            by_channel[walk.channels + c] = constants.scale;
            by_channel[2 * walk.channels + c] = constants.shift;
            by_channel[3 * walk.channels + c] = slopes == nullptr ? static_cast<T>(problem.negative_slope)
                                                                  : slopes[problem.slopes == 1 ? 0 : parameter];
        }
        for (int k = 0; k < kCount; ++k) walk.spread(by_channel + k * walk.channels, hi + k * walk.row);
    }
};

}  // namespace
}  // namespace pvc
