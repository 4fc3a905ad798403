// The Python module pyvolconv._C: raw pointers in, results written in place, the interpreter lock released.
//
// Knows nothing of torch. The caller guarantees what backends/base.py promises: dense tensors of the problem's dtype,
// layout and sizes, no size zero.
#include <dlfcn.h>
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bandwidth.h"
#include "bindings.h"
#include "dispatch.h"
#include "problem.h"

namespace py = pybind11;

namespace pvc {

Activation activation_of(const std::string& name) {
    constexpr const char* names[] = {"none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh"};
    for (int i = 0; i < 6; ++i) {
        if (name == names[i]) return static_cast<Activation>(i);
    }
    throw std::invalid_argument("activation=" + name +
                                " is unknown; expected none, relu, leaky_relu, silu, gelu or gelu_tanh");
}

}  // namespace pvc

namespace {

using pvc::activation_of;
using pvc::Plan;
using pvc::pointer;
using pvc::PooledPlan;
using pvc::Size3;
using pvc::with_passes;

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

Plan make_plan(int64_t batch, int64_t in_channels, int64_t out_channels, const Size3& input_size,
               const Size3& output_size, const Size3& kernel_size, const Size3& stride, const Size3& padding_begin,
               const Size3& padding_end, const Size3& dilation, int64_t groups, bool channels_last,
               bool source_channels_last, bool weight_channels_last, bool double_precision) {
    Plan plan = {};
    plan.double_precision = double_precision;
    pvc::ConvProblem& problem = plan.problem;
    problem.batch = batch;
    problem.in_channels = in_channels;
    problem.out_channels = out_channels;
    problem.groups = groups;
    const auto layout = [](bool last) { return last ? pvc::Layout::ndhwc : pvc::Layout::ncdhw; };
    problem.layout = layout(channels_last);
    problem.source_layout = layout(source_channels_last);
    problem.weight_layout = layout(weight_channels_last);
    for (int axis = 0; axis < 3; ++axis) {
        problem.input_size[axis] = input_size[axis];
        problem.output_size[axis] = output_size[axis];
        problem.kernel_size[axis] = kernel_size[axis];
        problem.stride[axis] = stride[axis];
        problem.padding_begin[axis] = padding_begin[axis];
        problem.padding_end[axis] = padding_end[axis];
        problem.dilation[axis] = dilation[axis];
    }
    return plan;
}

PooledPlan make_pooled_plan(const Plan& plan, const std::string& activation, double negative_slope, const Size3& window,
                            const Size3& stride, const Size3& padding, const Size3& pooled_size) {
    PooledPlan pooled = {};
    pooled.double_precision = plan.double_precision;
    pvc::PooledProblem& problem = pooled.problem;
    problem.conv = plan.problem;
    problem.activation = activation_of(activation);
    problem.negative_slope = negative_slope;
    for (int axis = 0; axis < 3; ++axis) {
        problem.pool_window[axis] = window[axis];
        problem.pool_stride[axis] = stride[axis];
        problem.pool_padding[axis] = padding[axis];
        problem.pooled_size[axis] = pooled_size[axis];
    }
    return pooled;
}

template <typename T>
void forward_as(const pvc::PassTable<T>& passes, const Plan& plan, uintptr_t x, uintptr_t weight, uintptr_t bias,
                uintptr_t y) {
    passes.forward(plan.problem, pointer<T>(x), pointer<T>(weight), pointer<T>(bias), pointer<T>(y));
}

void forward(const Plan& plan, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y) {
    const pvc::KernelTable& kernels = pvc::current_kernels();
    const py::gil_scoped_release release;
    if (plan.double_precision) {
        forward_as(kernels.float64, plan, x, weight, bias, y);
    } else {
        forward_as(kernels.float32, plan, x, weight, bias, y);
    }
}

void grad_input(const Plan& plan, uintptr_t grad_output, uintptr_t weight, uintptr_t result) {
    const pvc::KernelTable& kernels = pvc::current_kernels();
    const py::gil_scoped_release release;
    if (plan.double_precision) {
        kernels.float64.grad_input(plan.problem, pointer<double>(grad_output), pointer<double>(weight),
                                   pointer<double>(result));
    } else {
        kernels.float32.grad_input(plan.problem, pointer<float>(grad_output), pointer<float>(weight),
                                   pointer<float>(result));
    }
}

void grad_weight(const Plan& plan, uintptr_t grad_output, uintptr_t x, uintptr_t result) {
    const pvc::KernelTable& kernels = pvc::current_kernels();
    const py::gil_scoped_release release;
    if (plan.double_precision) {
        kernels.float64.grad_weight(plan.problem, pointer<double>(grad_output), pointer<double>(x),
                                    pointer<double>(result));
    } else {
        kernels.float32.grad_weight(plan.problem, pointer<float>(grad_output), pointer<float>(x),
                                    pointer<float>(result));
    }
}

void forward_max_pool(const PooledPlan& plan, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t pooled,
                      uintptr_t code) {
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.forward_max_pool(plan.problem, pointer<T>(x), pointer<T>(weight), pointer<T>(bias), pointer<T>(pooled),
                                pointer<uint8_t>(code));
    });
}

void grad_input_max_pool(const PooledPlan& plan, uintptr_t grad_pooled, uintptr_t code, uintptr_t weight,
                         uintptr_t result) {
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.grad_input_max_pool(plan.problem, pointer<T>(grad_pooled), pointer<uint8_t>(code), pointer<T>(weight),
                                   pointer<T>(result));
    });
}

void grad_weight_max_pool(const PooledPlan& plan, uintptr_t grad_pooled, uintptr_t code, uintptr_t x,
                          uintptr_t grad_weight, uintptr_t grad_bias) {
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.grad_weight_max_pool(plan.problem, pointer<T>(grad_pooled), pointer<uint8_t>(code), pointer<T>(x),
                                    pointer<T>(grad_weight), pointer<T>(grad_bias));
    });
}

// Calls body(passes, Storage{}) for tensors of float32 or of bfloat16, without the interpreter lock.
template <typename Body>
void with_bfloat16(const Plan& plan, bool float32, const Body& body) {
    if (!pvc::has_bfloat16()) throw std::invalid_argument("products of bfloat16 need AVX-512 with AVX512_BF16");
    if (plan.problem.groups != 1) throw std::invalid_argument("products of bfloat16 need one group");
    const pvc::KernelTable& kernels = pvc::current_kernels();
    const py::gil_scoped_release release;
    if (float32) {
        body(kernels.float32_by_bfloat16, float{});
    } else {
        body(kernels.bfloat16, uint16_t{});
    }
}

void bfloat16_forward(const Plan& plan, bool float32, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y) {
    with_bfloat16(plan, float32, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.forward(plan.problem, pointer<T>(x), pointer<T>(weight), pointer<T>(bias), pointer<T>(y));
    });
}

void bfloat16_grad_input(const Plan& plan, bool float32, uintptr_t grad_output, uintptr_t weight, uintptr_t result) {
    with_bfloat16(plan, float32, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.grad_input(plan.problem, pointer<T>(grad_output), pointer<T>(weight), pointer<T>(result));
    });
}

double fma_peak(double seconds) {
    const pvc::KernelTable& kernels = pvc::current_kernels();
    const py::gil_scoped_release release;
    return kernels.fma_peak(seconds);
}

std::string openmp_runtime() {
    Dl_info info = {};
    if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) == 0 || info.dli_fname == nullptr) return "";
    return info.dli_fname;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of pyvolconv; import torch first (it brings the OpenMP runtime).";

    py::class_<Plan>(module, "Plan")
        .def(py::init(&make_plan), py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("out_channels"),
             py::arg("input_size"), py::arg("output_size"), py::arg("kernel_size"), py::arg("stride"),
             py::arg("padding_begin"), py::arg("padding_end"), py::arg("dilation"), py::arg("groups"),
             py::arg("channels_last"), py::arg("source_channels_last"), py::arg("weight_channels_last"),
             py::arg("double_precision"));

    py::class_<PooledPlan>(module, "PooledPlan")
        .def(py::init(&make_pooled_plan), py::arg("plan"), py::kw_only(), py::arg("activation"),
             py::arg("negative_slope"), py::arg("window"), py::arg("stride"), py::arg("padding"),
             py::arg("pooled_size"));

    module.def("forward", &forward, py::arg("plan"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"));
    module.def("grad_input", &grad_input, py::arg("plan"), py::arg("grad_output"), py::arg("weight"),
               py::arg("grad_input"));
    module.def("grad_weight", &grad_weight, py::arg("plan"), py::arg("grad_output"), py::arg("x"),
               py::arg("grad_weight"));

    module.def("forward_max_pool", &forward_max_pool, py::arg("plan"), py::arg("x"), py::arg("weight"), py::arg("bias"),
               py::arg("pooled"), py::arg("code"));
    module.def("grad_input_max_pool", &grad_input_max_pool, py::arg("plan"), py::arg("grad_pooled"), py::arg("code"),
               py::arg("weight"), py::arg("grad_input"));
    module.def("grad_weight_max_pool", &grad_weight_max_pool, py::arg("plan"), py::arg("grad_pooled"), py::arg("code"),
               py::arg("x"), py::arg("grad_weight"), py::arg("grad_bias"));

    module.def("bfloat16_forward", &bfloat16_forward, py::arg("plan"), py::arg("float32"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("y"));
    module.def("bfloat16_grad_input", &bfloat16_grad_input, py::arg("plan"), py::arg("float32"), py::arg("grad_output"),
               py::arg("weight"), py::arg("grad_input"));
    module.def("has_bfloat16", &pvc::has_bfloat16);

    pvc::bind_winograd(module);
    pvc::bind_first_layer(module);
    pvc::bind_split(module);
    pvc::bind_reorder(module);
    pvc::bind_instance_norm(module);

    module.def("compiled_isas", &pvc::compiled_isas);
    module.def("supported_isas", &pvc::supported_isas);
    module.def("current_isa", &pvc::current_isa);
    module.def("use_isa", &pvc::use_isa, py::arg("isa"));

    module.def("measure_fma_peak", &fma_peak, py::arg("seconds") = 0.1);
    module.def("measure_copy_bandwidth", &pvc::measure_copy_bandwidth, py::arg("seconds") = 0.2,
               py::call_guard<py::gil_scoped_release>());
    module.def("compiler", [] { return std::string(kCompiler); });
    module.def("openmp_runtime", &openmp_runtime);
    module.def("openmp_threads", [] { return omp_get_max_threads(); });
}
