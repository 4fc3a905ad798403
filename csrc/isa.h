// What the instruction set of this translation unit offers a microkernel beyond the vector width.
//
// setup.py compiles isa_kernels.cpp once per instruction set with -DPVC_ISA=avx512|avx2|baseline and the flags of it.
#pragma once

#include "vector.h"

#ifndef PVC_ISA
#define PVC_ISA baseline
#endif

namespace pvc {
namespace {

// Vector registers that one tile of accumulators, its weights and a broadcast must share.
#if PVC_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// Bytes of one core's caches that the blocking aims at: a block of packed weights in half of L1, a tile in half of L2.
constexpr int64_t kL1Bytes = 32 * 1024;
constexpr int64_t kL2Bytes = 512 * 1024;

}  // namespace
}  // namespace pvc
