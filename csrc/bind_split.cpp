// The passes of csrc/algorithm/split_*.h in pyvolconv._C. An operand that has no parts is left to direct convolution.
#include <stdexcept>

#include "bindings.h"
#include "dispatch.h"

namespace py = pybind11;

namespace pvc {
namespace {

// Calls body(passes), without the interpreter lock, for the passes by products of parts.
template <typename Body>
void with_split(const Plan& plan, int parts, bool plain, const Body& body) {
    const KernelTable& kernels = current_kernels();
    if (kernels.split.forward == nullptr) throw std::invalid_argument("products of parts need AVX-512");
    if (!plain && !has_matrix_unit()) {
        throw std::invalid_argument("this processor has no matrix unit (AMX), or the system does not allow its use");
    }
    if (plan.double_precision || plan.problem.groups != 1 || parts < 1 || parts > 3) {
        throw std::invalid_argument("products of parts need float32, one group and 1 to 3 parts");
    }
    const py::gil_scoped_release release;
    body(kernels);
}

void split_forward(const Plan& plan, int parts, bool plain, uintptr_t x, uintptr_t weight, uintptr_t bias,
                   uintptr_t y) {
    with_split(plan, parts, plain, [&](const KernelTable& kernels) {
        if (!kernels.split.forward(plan.problem, parts, plain, pointer<float>(x), pointer<float>(weight),
                                   pointer<float>(bias), pointer<float>(y))) {
            kernels.float32.forward(plan.problem, pointer<float>(x), pointer<float>(weight), pointer<float>(bias),
                                    pointer<float>(y));
        }
    });
}

// Returns whether the bias was added.
bool split_grad_input(const Plan& plan, int parts, bool plain, uintptr_t grad_output, uintptr_t weight, uintptr_t bias,
                      uintptr_t result) {
    bool adds_bias = false;
    with_split(plan, parts, plain, [&](const KernelTable& kernels) {
        if (!kernels.split.grad_input(plan.problem, parts, plain, pointer<float>(grad_output), pointer<float>(weight),
                                      pointer<float>(bias), pointer<float>(result), adds_bias)) {
            adds_bias = false;
            kernels.float32.grad_input(plan.problem, pointer<float>(grad_output), pointer<float>(weight),
                                       pointer<float>(result));
        }
    });
    return adds_bias;
}

void split_grad_weight(const Plan& plan, int parts, bool plain, uintptr_t grad_output, uintptr_t x, uintptr_t result) {
    with_split(plan, parts, plain, [&](const KernelTable& kernels) {
        if (!kernels.split.grad_weight(plan.problem, parts, plain, pointer<float>(grad_output), pointer<float>(x),
                                       pointer<float>(result))) {
            kernels.float32.grad_weight(plan.problem, pointer<float>(grad_output), pointer<float>(x),
                                        pointer<float>(result));
        }
    });
}

}  // namespace

void bind_split(py::module_& module) {
    module.def("split_forward", &split_forward, py::arg("plan"), py::arg("parts"), py::arg("plain"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("y"));
    module.def("split_grad_input", &split_grad_input, py::arg("plan"), py::arg("parts"), py::arg("plain"),
               py::arg("grad_output"), py::arg("weight"), py::arg("bias"), py::arg("grad_input"));
    module.def("split_grad_weight", &split_grad_weight, py::arg("plan"), py::arg("parts"), py::arg("plain"),
               py::arg("grad_output"), py::arg("x"), py::arg("grad_weight"));
    module.def("has_matrix_unit", &has_matrix_unit);
}

}  // namespace pvc
