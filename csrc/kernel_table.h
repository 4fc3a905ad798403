// The entry points that each instruction set provides; dispatch.cpp picks one table at run time.
#pragma once

#include "instance_norm.h"
#include "problem.h"

namespace pvc {

// The passes for T = float or double, on dense tensors in problem.layout. Every output value is written.
template <typename T>
struct PassTable {
    void (*forward)(const ConvProblem&, const T* x, const T* weight, const T* bias /* or null */, T* y);
    void (*grad_input)(const ConvProblem&, const T* grad_output, const T* weight, T* grad_input);
    void (*grad_weight)(const ConvProblem&, const T* grad_output, const T* x, T* grad_weight);

    // Convolution, activation and max-pool in one. `code`, which may be null in the forward pass, has the order of
    // `pooled`; `grad_pooled` is the gradient of the chosen pre-activation values.
    void (*forward_max_pool)(const PooledProblem&, const T* x, const T* weight, const T* bias /* or null */, T* pooled,
                             uint8_t* code);
    void (*grad_input_max_pool)(const PooledProblem&, const T* grad_pooled, const uint8_t* code, const T* weight,
                                T* grad_input);
    void (*grad_weight_max_pool)(const PooledProblem&, const T* grad_pooled, const uint8_t* code, const T* x,
                                 T* grad_weight, T* grad_bias /* or null */);

    // By Winograd, `outputs` per axis and tile; algorithm/winograd_gather.h and winograd_pooled.h
    // say what the problem must be like. has_winograd: whether there is such a scheme.
    bool (*has_winograd)(const ConvProblem&, const int64_t outputs[3], bool transposed);
    void (*winograd_forward)(const ConvProblem&, const int64_t outputs[3], const T* x, const T* weight,
                             const T* bias /* or null */, T* y);
    void (*winograd_grad_input)(const ConvProblem&, const int64_t outputs[3], const T* grad_output, const T* weight,
                                T* grad_input);
    void (*winograd_grad_weight)(const ConvProblem&, const int64_t outputs[3] /* none is 4 */, const T* grad_output,
                                 const T* x, T* grad_weight);
    void (*winograd_forward_max_pool)(const PooledProblem&, const int64_t outputs[3], const T* x, const T* weight,
                                      const T* bias /* or null */, T* pooled, uint8_t* code);

    // For few input channels; algorithm/first_layer.h and first_layer_grad_input.h say what the problem must be like.
    void (*first_layer_forward)(const ConvProblem&, const T* x, const T* weight, const T* bias /* or null */, T* y);
    void (*first_layer_grad_input)(const ConvProblem&, const T* grad_output, const T* weight, T* grad_input);
    void (*first_layer_grad_weight)(const ConvProblem&, const T* grad_output, const T* x, T* grad_weight);
    void (*first_layer_forward_max_pool)(const PooledProblem&, const T* x, const T* weight, const T* bias /* or null */,
                                         T* pooled, uint8_t* code);

    // to[sample][c][r] = from[sample][r][c]: a tensor in the other layout.
    void (*reorder)(int64_t samples, int64_t rows, int64_t columns, const T* from, T* to);
};

// By dot products of bfloat16 pairs, one group; algorithm/bfloat_gather.h. `Storage` is float or, as its bits,
// bfloat16. Null where the instruction set of the table has no such product; the processor needs AVX512_BF16.
template <typename Storage>
struct BfloatTable {
    void (*forward)(const ConvProblem&, const Storage* x, const Storage* weight, const Storage* bias /* or null */,
                    Storage* y);
    void (*grad_input)(const ConvProblem&, const Storage* grad_output, const Storage* weight, Storage* grad_input);
};

enum class Storage { float32, float16, bfloat16 };

// How tensors become operands of a matrix unit. Values are split into `parts` bfloat16 ones: those of float32 into 1 to
// 3, of float16 into 2, of bfloat16 into 1. `plain` computes as the unit would without one.
struct SplitOptions {
    Storage storage;
    int parts;
    bool plain;
};

// By products of bfloat16 parts on a matrix unit, one group, tensors of `storage`; algorithm/split_gather.h.
// `adds_bias`: set to whether grad_input added the bias, which it does where that saves a pass over the result, with
// the rounding of one where sums are float32. Return false where an operand has no parts: nothing is promised about the
// result then. Null where the instruction set of the table has none; the unit needs AMX and the system's leave.
struct SplitTable {
    bool (*forward)(const ConvProblem&, const SplitOptions&, const void* x, const void* weight,
                    const void* bias /* or null */, void* y);
    bool (*grad_input)(const ConvProblem&, const SplitOptions&, const void* grad_output, const void* weight,
                       const void* bias /* of the input's channels, or null */, void* grad_input, bool& adds_bias);
    bool (*grad_weight)(const ConvProblem&, const SplitOptions&, const void* grad_output, const void* x,
                        void* grad_weight);
};

struct KernelTable {
    PassTable<float> float32;
    PassTable<double> float64;
    BfloatTable<float> float32_by_bfloat16;
    BfloatTable<uint16_t> bfloat16;
    SplitTable split;
    double (*fma_peak)(double seconds);  // measured float32 FLOP/s of all threads of the caller
    InstanceNormTable<float> instance_norm_float32;
    InstanceNormTable<double> instance_norm_float64;
};

extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_baseline;

}  // namespace pvc
