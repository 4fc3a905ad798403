// The one source that is compiled once per instruction set (see setup.py).
//
// Everything it includes lives in unnamed namespaces and uses no inline function of the standard library: a weak symbol
// from here, built with AVX-512 flags, could replace the same symbol elsewhere in the process. The table is all it
// exports.
#include "algorithm/bfloat_gather.h"
#include "algorithm/direct_forward.h"
#include "algorithm/direct_grad_input.h"
#include "algorithm/direct_grad_weight.h"
#include "algorithm/first_layer.h"
#include "algorithm/first_layer_grad_input.h"
#include "algorithm/first_layer_grad_weight.h"
#include "algorithm/instance_norm_backward.h"
#include "algorithm/instance_norm_forward.h"
#include "algorithm/pooled_forward.h"
#include "algorithm/reorder.h"
#include "algorithm/sparse_grad_input.h"
#include "algorithm/sparse_grad_weight.h"
#include "algorithm/split_gather.h"
#include "algorithm/split_grad_weight.h"
#include "algorithm/winograd_gather.h"
#include "algorithm/winograd_grad_weight.h"
#include "algorithm/winograd_pooled.h"
#include "isa.h"
#include "kernel_table.h"
#include "microkernel/fma_peak.h"

#define PVC_JOIN_(a, b) a##b
#define PVC_JOIN(a, b) PVC_JOIN_(a, b)

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)
const Bfloat16* values(const uint16_t* bits) { return reinterpret_cast<const Bfloat16*>(bits); }

void bfloat16_forward(const ConvProblem& problem, const uint16_t* x, const uint16_t* weight, const uint16_t* bias,
                      uint16_t* y) {
    bfloat_forward(problem, values(x), values(weight), values(bias), reinterpret_cast<Bfloat16*>(y));
}

void bfloat16_grad_input(const ConvProblem& problem, const uint16_t* grad_output, const uint16_t* weight,
                         uint16_t* grad_input) {
    bfloat_grad_input(problem, values(grad_output), values(weight), reinterpret_cast<Bfloat16*>(grad_input));
}

constexpr BfloatTable<float> kByBfloat16 = {bfloat_forward<float>, bfloat_grad_input<float>};
constexpr BfloatTable<uint16_t> kBfloat16 = {bfloat16_forward, bfloat16_grad_input};

// Calls pass(unit, parts, storage) with types and a number that are known when it is compiled.
template <typename Pass>
bool with_split_options(const SplitOptions& options, const Pass& pass) {
    const auto with_unit = [&](auto unit) {
        if (options.storage == Storage::bfloat16) return pass(unit, Number<1>{}, Type<Bfloat16>{});
        if (options.storage == Storage::float16) return pass(unit, Number<2>{}, Type<Float16>{});
        if (options.parts == 1) return pass(unit, Number<1>{}, Type<float>{});
        return options.parts == 2 ? pass(unit, Number<2>{}, Type<float>{}) : pass(unit, Number<3>{}, Type<float>{});
    };
    return options.plain ? with_unit(Type<PlainMatrixUnit>{}) : with_unit(Type<MatrixUnit>{});
}

bool split_forward_by(const ConvProblem& problem, const SplitOptions& options, const void* x, const void* weight,
                      const void* bias, void* y) {
    return with_split_options(options, [&](auto unit, auto parts, auto storage) {
        using S = typename decltype(storage)::type;
        return split_forward<typename decltype(unit)::type, decltype(parts)::number>(
            problem, static_cast<const S*>(x), static_cast<const S*>(weight), static_cast<const S*>(bias),
            static_cast<S*>(y));
    });
}

bool split_grad_input_by(const ConvProblem& problem, const SplitOptions& options, const void* grad_output,
                         const void* weight, const void* bias, void* grad_input, bool& adds_bias) {
    return with_split_options(options, [&](auto unit, auto parts, auto storage) {
        using S = typename decltype(storage)::type;
        return split_grad_input<typename decltype(unit)::type, decltype(parts)::number>(
            problem, static_cast<const S*>(grad_output), static_cast<const S*>(weight), static_cast<const S*>(bias),
            static_cast<S*>(grad_input), adds_bias);
    });
}

bool split_grad_weight_by(const ConvProblem& problem, const SplitOptions& options, const void* grad_output,
                          const void* x, void* grad_weight) {
    return with_split_options(options, [&](auto unit, auto parts, auto storage) {
        using S = typename decltype(storage)::type;
        return split_grad_weight<typename decltype(unit)::type, decltype(parts)::number>(
            problem, static_cast<const S*>(grad_output), static_cast<const S*>(x), static_cast<S*>(grad_weight));
    });
}

constexpr SplitTable kSplit = {split_forward_by, split_grad_input_by, split_grad_weight_by};
#else
constexpr BfloatTable<float> kByBfloat16 = {};
constexpr BfloatTable<uint16_t> kBfloat16 = {};
constexpr SplitTable kSplit = {};
#endif

}  // namespace

const KernelTable PVC_JOIN(kernels_, PVC_ISA) = {
    {direct_forward<float>, direct_grad_input<float>, direct_grad_weight<float>, pooled_forward<float>,
     sparse_grad_input<float>, sparse_grad_weight<float>, has_winograd<float>, winograd_forward<float>,
     winograd_grad_input<float>, winograd_grad_weight<float>, winograd_pooled<float>, first_layer_forward<float>,
     first_layer_grad_input<float>, first_layer_grad_weight<float>, first_layer_pooled<float>, reorder<float>},
    {direct_forward<double>, direct_grad_input<double>, direct_grad_weight<double>, pooled_forward<double>,
     sparse_grad_input<double>, sparse_grad_weight<double>, has_winograd<double>, winograd_forward<double>,
     winograd_grad_input<double>, winograd_grad_weight<double>, winograd_pooled<double>, first_layer_forward<double>,
     first_layer_grad_input<double>, first_layer_grad_weight<double>, first_layer_pooled<double>, reorder<double>},
    kByBfloat16,
    kBfloat16,
    kSplit,
    measure_fma_peak,
    {instance_norm_forward<float>, instance_norm_backward<float>},
    {instance_norm_forward<double>, instance_norm_backward<double>},
};

}  // namespace pvc
