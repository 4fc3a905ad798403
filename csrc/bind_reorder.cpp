// Tensors copied from one layout into the other in pyvolconv._C (csrc/algorithm/reorder.h).
#include "bindings.h"
#include "dispatch.h"

namespace py = pybind11;

namespace pvc {
namespace {

void reorder(bool double_precision, int64_t samples, int64_t rows, int64_t columns, uintptr_t from, uintptr_t to) {
    const KernelTable& kernels = current_kernels();
    const py::gil_scoped_release release;
    if (double_precision) {
        kernels.float64.reorder(samples, rows, columns, pointer<double>(from), pointer<double>(to));
    } else {
        kernels.float32.reorder(samples, rows, columns, pointer<float>(from), pointer<float>(to));
    }
}

}  // namespace

void bind_reorder(py::module_& module) {
    module.def("reorder", &reorder, py::arg("double_precision"), py::arg("samples"), py::arg("rows"),
               py::arg("columns"), py::arg("source"), py::arg("target"));
}

}  // namespace pvc
