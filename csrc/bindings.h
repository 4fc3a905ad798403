// What the files that make up the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "problem.h"

namespace pvc {

struct Plan {
    ConvProblem problem;
    bool double_precision;
};

// An address that Python passed, null for 0.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Throws std::invalid_argument when there is no such activation.
Activation activation_of(const std::string& name);

// The passes by products of parts (bind_split.cpp), instance normalization (bind_instance_norm.cpp), and copies in the
// other layout (bind_reorder.cpp).
void bind_split(pybind11::module_& module);
void bind_instance_norm(pybind11::module_& module);
void bind_reorder(pybind11::module_& module);

}  // namespace pvc
