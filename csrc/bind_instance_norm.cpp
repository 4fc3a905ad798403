// Instance and batch normalization in pyvolconv._C (csrc/algorithm/norm_plane.h).
#include <stdexcept>

#include "bindings.h"
#include "dispatch.h"
#include "instance_norm.h"

namespace py = pybind11;

namespace pvc {
namespace {

// Calls body(passes, T{}) for the dtype, without the interpreter lock.
template <typename Body>
void with_instance_norm(bool double_precision, const Body& body) {
    const KernelTable& kernels = current_kernels();
    const py::gil_scoped_release release;
    if (double_precision) {
        body(kernels.instance_norm_float64, double{});
    } else {
        body(kernels.instance_norm_float32, float{});
    }
}

InstanceNormProblem make_instance_norm(int64_t samples, int64_t voxels, int64_t channels, int64_t sharing,
                                       int64_t parameters, double eps, const std::string& activation,
                                       double negative_slope, int64_t slopes, bool planar_result) {
    const Activation known = activation_of(activation);
    if (known > Activation::leaky_relu) {
        throw std::invalid_argument("activation=" + activation + " does not follow instance normalization in one pass");
    }
    return {samples, voxels, channels, sharing, parameters, eps, known, negative_slope, slopes, planar_result};
}

void instance_norm_forward(const InstanceNormProblem& problem, bool double_precision, uintptr_t x, uintptr_t weight,
                           uintptr_t bias, uintptr_t slopes, uintptr_t y, uintptr_t statistics) {
    with_instance_norm(double_precision, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.forward(problem, pointer<T>(x), pointer<T>(weight), pointer<T>(bias), pointer<T>(slopes), pointer<T>(y),
                       pointer<double>(statistics));
    });
}

void instance_norm_backward(const InstanceNormProblem& problem, bool double_precision, uintptr_t grad_output,
                            uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t slopes, uintptr_t statistics,
                            uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t grad_slopes) {
    with_instance_norm(double_precision, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.backward(problem, pointer<T>(grad_output), pointer<T>(x), pointer<T>(weight), pointer<T>(bias),
                        pointer<T>(slopes), pointer<double>(statistics), pointer<T>(grad_input),
                        pointer<T>(grad_weight), pointer<T>(grad_bias), pointer<T>(grad_slopes));
    });
}

// As torch's batch normalization: running = (1 - factor) running + factor new, of the variance over one voxel less.
template <typename T>
void follow(const InstanceNormProblem& problem, double factor, const double* statistics, T* mean, T* variance) {
    const int64_t planes = problem.samples * problem.channels;
    const double voxels = static_cast<double>(problem.voxels * problem.sharing);
    const auto average = [&](T running, double now) {
        return static_cast<T>((1 - factor) * static_cast<double>(running) + factor * now);
    };
    for (int64_t c = 0; c < problem.parameters; ++c) {
        mean[c] = average(mean[c], statistics[c]);
        variance[c] = average(variance[c], statistics[2 * planes + c] * voxels / (voxels - 1));
    }
}

void update_running_statistics(const InstanceNormProblem& problem, bool double_precision, double factor,
                               uintptr_t statistics, uintptr_t mean, uintptr_t variance) {
    const auto* now = pointer<double>(statistics);
    if (double_precision) {
        follow(problem, factor, now, pointer<double>(mean), pointer<double>(variance));
    } else {
        follow(problem, factor, now, pointer<float>(mean), pointer<float>(variance));
    }
}

}  // namespace

void bind_instance_norm(py::module_& module) {
    py::class_<InstanceNormProblem>(module, "InstanceNorm")
        .def(py::init(&make_instance_norm), py::kw_only(), py::arg("samples"), py::arg("voxels"), py::arg("channels"),
             py::arg("sharing"), py::arg("parameters"), py::arg("eps"), py::arg("activation"),
             py::arg("negative_slope"), py::arg("slopes"), py::arg("planar_result"));
    module.def("instance_norm_forward", &instance_norm_forward, py::arg("plan"), py::arg("double_precision"),
               py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("slopes"), py::arg("y"),
               py::arg("statistics"));
    module.def("instance_norm_backward", &instance_norm_backward, py::arg("plan"), py::arg("double_precision"),
               py::arg("grad_output"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("slopes"),
               py::arg("statistics"), py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"),
               py::arg("grad_slopes"));
    module.def("update_running_statistics", &update_running_statistics, py::arg("plan"), py::arg("double_precision"),
               py::arg("factor"), py::arg("statistics"), py::arg("running_mean"), py::arg("running_variance"));
}

}  // namespace pvc
