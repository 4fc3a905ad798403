// Activations of a vector of pre-activation values, by torch's formulas.
#pragma once

#include "../problem.h"
#include "../vector.h"

namespace pvc {
namespace {

inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float error_function(float x) { return __builtin_erff(x); }
inline double error_function(double x) { return __builtin_erf(x); }
inline float hyperbolic_tangent(float x) { return __builtin_tanhf(x); }
inline double hyperbolic_tangent(double x) { return __builtin_tanh(x); }

template <Activation A, typename T>
inline T activate_one(T z) {
    if constexpr (A == Activation::silu) return z / (1 + exponential(-z));
    if constexpr (A == Activation::gelu) return z * (T(0.5) * (1 + error_function(z * T(0.70710678118654752440))));
    const T inner = T(0.79788456080286535588) * (z + T(0.044715) * z * z * z);  // sqrt(2 / pi)
    return T(0.5) * z * (1 + hyperbolic_tangent(inner));
}

template <Activation A, typename T>
inline typename Vector<T>::type activate(typename Vector<T>::type z, T negative_slope) {
    using vector = typename Vector<T>::type;
    if constexpr (A == Activation::none) return z;
    if constexpr (A == Activation::relu) return z <= T(0) ? vector{} : z;
    if constexpr (A == Activation::leaky_relu) return z > T(0) ? z : z * negative_slope;
    if constexpr (A == Activation::silu || A == Activation::gelu || A == Activation::gelu_tanh) {
        for (int i = 0; i < Vector<T>::lanes; ++i) z[i] = activate_one<A, T>(z[i]);
    }
    return z;
}

}  // namespace
}  // namespace pvc
