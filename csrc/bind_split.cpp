// The passes of csrc/algorithm/split_*.h in pyvolconv._C. They return whether operands have parts; the caller computes
// otherwise where not.
#include <stdexcept>
#include <utility>

#include "bindings.h"
#include "dispatch.h"

namespace py = pybind11;

namespace pvc {
namespace {

Storage storage_of(const std::string& dtype) {
    if (dtype == "float32") return Storage::float32;
    if (dtype == "float16") return Storage::float16;
    if (dtype == "bfloat16") return Storage::bfloat16;
    throw std::invalid_argument("products of parts need float32, float16 or bfloat16, not " + dtype);
}

SplitOptions checked_options(const Plan& plan, const std::string& dtype, int parts, bool plain) {
    if (current_kernels().split.forward == nullptr) throw std::invalid_argument("products of parts need AVX-512");
    if (!plain && !has_matrix_unit()) {
        throw std::invalid_argument("this processor has no matrix unit (AMX), or the system does not allow its use");
    }
    const SplitOptions options = {storage_of(dtype), parts, plain};
    const int least = options.storage == Storage::float16 ? 2 : 1;
    const int most = options.storage == Storage::float32 ? 3 : least;
    if (plan.double_precision || plan.problem.groups != 1 || parts < least || parts > most) {
        throw std::invalid_argument(
            "products of parts need one group, and 1 to 3 parts of float32, 2 of float16, 1 of "
            "bfloat16");
    }
    return options;
}

bool split_forward(const Plan& plan, const std::string& dtype, int parts, bool plain, uintptr_t x, uintptr_t weight,
                   uintptr_t bias, uintptr_t y) {
    const SplitOptions options = checked_options(plan, dtype, parts, plain);
    const py::gil_scoped_release release;
    return current_kernels().split.forward(plan.problem, options, pointer<void>(x), pointer<void>(weight),
                                           pointer<void>(bias), pointer<void>(y));
}

// Also whether the bias was added.
std::pair<bool, bool> split_grad_input(const Plan& plan, const std::string& dtype, int parts, bool plain,
                                       uintptr_t grad_output, uintptr_t weight, uintptr_t bias, uintptr_t result) {
    const SplitOptions options = checked_options(plan, dtype, parts, plain);
    const py::gil_scoped_release release;
    bool adds_bias = false;
    const bool splits =
        current_kernels().split.grad_input(plan.problem, options, pointer<void>(grad_output), pointer<void>(weight),
                                           pointer<void>(bias), pointer<void>(result), adds_bias);
    return {splits, splits && adds_bias};
}

bool split_grad_weight(const Plan& plan, const std::string& dtype, int parts, bool plain, uintptr_t grad_output,
                       uintptr_t x, uintptr_t result) {
    const SplitOptions options = checked_options(plan, dtype, parts, plain);
    const py::gil_scoped_release release;
    return current_kernels().split.grad_weight(plan.problem, options, pointer<void>(grad_output), pointer<void>(x),
                                               pointer<void>(result));
}

}  // namespace

void bind_split(py::module_& module) {
    module.def("split_forward", &split_forward, py::arg("plan"), py::arg("dtype"), py::arg("parts"), py::arg("plain"),
               py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"));
    module.def("split_grad_input", &split_grad_input, py::arg("plan"), py::arg("dtype"), py::arg("parts"),
               py::arg("plain"), py::arg("grad_output"), py::arg("weight"), py::arg("bias"), py::arg("grad_input"));
    module.def("split_grad_weight", &split_grad_weight, py::arg("plan"), py::arg("dtype"), py::arg("parts"),
               py::arg("plain"), py::arg("grad_output"), py::arg("x"), py::arg("grad_weight"));
    module.def("has_matrix_unit", &has_matrix_unit);
}

}  // namespace pvc
