// Which instruction sets are compiled in, which this machine can run, and which one is used.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace pvc {

// Names, fastest first: "avx512", "avx2", "baseline".
std::vector<std::string> compiled_isas();

// Those of compiled_isas() that the processor has and the operating system has enabled.
std::vector<std::string> supported_isas();

// The fastest supported one, or what the environment variable PYVOLCONV_ISA or use_isa said; read at first use.
// Throws std::invalid_argument when PYVOLCONV_ISA names none of supported_isas().
std::string current_isa();
const KernelTable& current_kernels();

// Whether KernelTable::bfloat16 and float32_by_bfloat16 can run.
bool has_bfloat16();

// Whether KernelTable::split can run on the processor's own matrix unit. Asks the system for leave to use it, once.
bool has_matrix_unit();

// Selects one for the rest of the process. Throws std::invalid_argument like current_isa().
void use_isa(const std::string& name);

}  // namespace pvc
