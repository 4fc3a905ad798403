// What the files that make up the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

#include "dispatch.h"
#include "problem.h"

namespace pvc {

struct Plan {
    ConvProblem problem;
    bool double_precision;
};

struct PooledPlan {
    PooledProblem problem;
    bool double_precision;
};

using Size3 = std::array<int64_t, 3>;

// An address that Python passed, null for 0.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls body(passes, T{}) with the passes of the plan's dtype, without the interpreter lock.
template <typename AnyPlan, typename Body>
void with_passes(const AnyPlan& plan, const Body& body) {
    const KernelTable& kernels = current_kernels();
    const pybind11::gil_scoped_release release;
    if (plan.double_precision) {
        body(kernels.float64, double{});
    } else {
        body(kernels.float32, float{});
    }
}

// Throws std::invalid_argument when there is no such activation.
Activation activation_of(const std::string& name);

// One family of functions each, in the file of its name.
void bind_winograd(pybind11::module_& module);
void bind_first_layer(pybind11::module_& module);
void bind_split(pybind11::module_& module);
void bind_instance_norm(pybind11::module_& module);
void bind_reorder(pybind11::module_& module);

}  // namespace pvc
