// Instance or batch normalization and the activation behind it: what a call says, and the entry points of an
// instruction set.
#pragma once

#include <cstdint>

#include "problem.h"

namespace pvc {

// A plane is a channel of a sample. ncdhw: every plane is a sample of one channel here; ndhwc: as torch counts. Batch
// normalization in ndhwc is that of one sample with the voxels of all; in ncdhw planes of several samples share
// statistics.
struct InstanceNormProblem {
    int64_t samples, voxels, channels;  // tensors are dense [samples][voxels][channels]
    int64_t sharing;                    // samples that share statistics: sample s is in group s % (samples / sharing)
    int64_t parameters;                 // values of weight and bias: plane p has the one at p % parameters
    double eps;
    Activation activation;  // none, relu or leaky_relu
    double negative_slope;  // of leaky_relu
    int64_t slopes;         // 0, or PReLU in place of `activation`: its weights, one or as many as `parameters`
    bool planar_result;     // forward's y is [samples][channels][voxels]

    int64_t groups() const { return samples / sharing; }
};

// T is float or double. `statistics` are mean, 1 / sqrt(variance + eps) and variance, [3][samples * channels]. Operands
// that may be null are not there, or results that nobody wants.
template <typename T>
struct InstanceNormTable {
    void (*forward)(const InstanceNormProblem&, const T* x, const T* weight /* or null */, const T* bias /* or null */,
                    const T* slopes /* or null */, T* y, double* statistics);
    void (*backward)(const InstanceNormProblem&, const T* grad_output, const T* x, const T* weight /* or null */,
                     const T* bias /* or null */, const T* slopes /* or null */, const double* statistics,
                     T* grad_input /* or null */, T* grad_weight /* or null */, T* grad_bias /* or null */,
                     T* grad_slopes /* or null */);
};

}  // namespace pvc
