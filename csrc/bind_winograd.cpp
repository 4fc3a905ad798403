// The passes of csrc/algorithm/winograd_*.h in pyvolconv._C.
#include <pybind11/stl.h>

#include <stdexcept>

#include "bindings.h"

namespace py = pybind11;

namespace pvc {
namespace {

// What the Winograd kernels rely on; a scheme that does not fit would write outside of its tiles.
template <typename T>
void check_winograd(const PassTable<T>& passes, const ConvProblem& problem, const Size3& outputs, bool transposed) {
    bool fits = passes.has_winograd(problem, outputs.data(), transposed) && problem.groups == 1;
    for (int axis = 0; axis < 3; ++axis) {
        fits = fits && problem.kernel_size[axis] == (outputs[axis] == 1 ? 1 : 3);
        const bool strided = transposed && problem.stride[axis] != 1;
        fits = fits && !(strided && (problem.padding_begin[axis] % 2 == 0 || problem.dilation[axis] != 1));
    }
    if (!fits) throw std::invalid_argument("no Winograd scheme with these outputs per tile fits the problem");
}

// Calls body(passes, T{}) with the passes of the dtype, without the interpreter lock, if the scheme fits the problem.
template <typename Body>
void with_winograd(const ConvProblem& problem, bool double_precision, const Size3& outputs, const Body& body,
                   bool transposed = false) {
    const KernelTable& kernels = current_kernels();
    if (double_precision) {
        check_winograd(kernels.float64, problem, outputs, transposed);
        const py::gil_scoped_release release;
        body(kernels.float64, double{});
    } else {
        check_winograd(kernels.float32, problem, outputs, transposed);
        const py::gil_scoped_release release;
        body(kernels.float32, float{});
    }
}

void winograd_forward(const Plan& plan, const Size3& outputs, uintptr_t x, uintptr_t weight, uintptr_t bias,
                      uintptr_t y) {
    with_winograd(plan.problem, plan.double_precision, outputs, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.winograd_forward(plan.problem, outputs.data(), pointer<T>(x), pointer<T>(weight), pointer<T>(bias),
                                pointer<T>(y));
    });
}

void winograd_grad_input(const Plan& plan, const Size3& outputs, uintptr_t grad_output, uintptr_t weight,
                         uintptr_t result) {
    with_winograd(
        plan.problem, plan.double_precision, outputs,
        [&](const auto& passes, auto zero) {
            using T = decltype(zero);
            passes.winograd_grad_input(plan.problem, outputs.data(), pointer<T>(grad_output), pointer<T>(weight),
                                       pointer<T>(result));
        },
        true);
}

void winograd_grad_weight(const Plan& plan, const Size3& outputs, uintptr_t grad_output, uintptr_t x,
                          uintptr_t result) {
    for (const int64_t count : outputs) {
        if (count > 2)
            throw std::invalid_argument("the gradient of a weight takes one or two outputs per tile and axis");
    }
    with_winograd(plan.problem, plan.double_precision, outputs, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.winograd_grad_weight(plan.problem, outputs.data(), pointer<T>(grad_output), pointer<T>(x),
                                    pointer<T>(result));
    });
}

void winograd_forward_max_pool(const PooledPlan& plan, const Size3& outputs, uintptr_t x, uintptr_t weight,
                               uintptr_t bias, uintptr_t pooled, uintptr_t code) {
    const PooledProblem& problem = plan.problem;
    for (int axis = 0; axis < 3; ++axis) {
        if (problem.pool_padding[axis] != 0 || problem.pool_stride[axis] != problem.pool_window[axis] ||
            outputs[axis] % problem.pool_window[axis] != 0 || problem.conv.dilation[axis] != 1) {
            throw std::invalid_argument("the windows of the pool do not fit into tiles of these outputs");
        }
    }
    with_winograd(problem.conv, plan.double_precision, outputs, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.winograd_forward_max_pool(problem, outputs.data(), pointer<T>(x), pointer<T>(weight), pointer<T>(bias),
                                         pointer<T>(pooled), pointer<uint8_t>(code));
    });
}

}  // namespace

void bind_winograd(py::module_& module) {
    module.def("winograd_forward", &winograd_forward, py::arg("plan"), py::arg("outputs"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("y"));
    module.def("winograd_grad_input", &winograd_grad_input, py::arg("plan"), py::arg("outputs"), py::arg("grad_output"),
               py::arg("weight"), py::arg("grad_input"));
    module.def("winograd_grad_weight", &winograd_grad_weight, py::arg("plan"), py::arg("outputs"),
               py::arg("grad_output"), py::arg("x"), py::arg("grad_weight"));
    module.def("winograd_forward_max_pool", &winograd_forward_max_pool, py::arg("plan"), py::arg("outputs"),
               py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("pooled"), py::arg("code"));
}

}  // namespace pvc
