// The passes of csrc/algorithm/first_layer*.h in pyvolconv._C.
#include <stdexcept>

#include "bindings.h"

namespace py = pybind11;

namespace pvc {
namespace {

// What the kernels for few input channels rely on.
void check_first_layer(const ConvProblem& problem) {
    bool fits = problem.groups == 1;
    for (int axis = 0; axis < 3; ++axis) {
        fits = fits && problem.stride[axis] == 1 && problem.dilation[axis] == 1 && problem.kernel_size[axis] == 3;
    }
    if (!fits) throw std::invalid_argument("the first-layer kernels need 3x3x3 taps, stride 1 and one group");
}

void first_layer_forward(const Plan& plan, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y) {
    check_first_layer(plan.problem);
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.first_layer_forward(plan.problem, pointer<T>(x), pointer<T>(weight), pointer<T>(bias), pointer<T>(y));
    });
}

void first_layer_grad_input(const Plan& plan, uintptr_t grad_output, uintptr_t weight, uintptr_t result) {
    if (plan.problem.in_channels > 4 || plan.problem.groups != 1) {
        throw std::invalid_argument("the first-layer gradient needs 1 to 4 channels in one group");
    }
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.first_layer_grad_input(plan.problem, pointer<T>(grad_output), pointer<T>(weight), pointer<T>(result));
    });
}

void first_layer_grad_weight(const Plan& plan, uintptr_t grad_output, uintptr_t x, uintptr_t result) {
    check_first_layer(plan.problem);
    if (plan.problem.in_channels > 4) throw std::invalid_argument("the first-layer gradient needs 1 to 4 channels");
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.first_layer_grad_weight(plan.problem, pointer<T>(grad_output), pointer<T>(x), pointer<T>(result));
    });
}

void first_layer_forward_max_pool(const PooledPlan& plan, uintptr_t x, uintptr_t weight, uintptr_t bias,
                                  uintptr_t pooled, uintptr_t code) {
    const PooledProblem& problem = plan.problem;
    check_first_layer(problem.conv);
    for (int axis = 0; axis < 3; ++axis) {
        if (problem.pool_window[axis] != 2 || problem.pool_stride[axis] != 2 || problem.pool_padding[axis] != 0) {
            throw std::invalid_argument("the first-layer kernels pool windows of 2x2x2 with stride 2 and no padding");
        }
    }
    with_passes(plan, [&](const auto& passes, auto zero) {
        using T = decltype(zero);
        passes.first_layer_forward_max_pool(problem, pointer<T>(x), pointer<T>(weight), pointer<T>(bias),
                                            pointer<T>(pooled), pointer<uint8_t>(code));
    });
}

}  // namespace

void bind_first_layer(py::module_& module) {
    module.def("first_layer_forward", &first_layer_forward, py::arg("plan"), py::arg("x"), py::arg("weight"),
               py::arg("bias"), py::arg("y"));
    module.def("first_layer_grad_input", &first_layer_grad_input, py::arg("plan"), py::arg("grad_output"),
               py::arg("weight"), py::arg("grad_input"));
    module.def("first_layer_grad_weight", &first_layer_grad_weight, py::arg("plan"), py::arg("grad_output"),
               py::arg("x"), py::arg("grad_weight"));
    module.def("first_layer_forward_max_pool", &first_layer_forward_max_pool, py::arg("plan"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("pooled"), py::arg("code"));
}

}  // namespace pvc
