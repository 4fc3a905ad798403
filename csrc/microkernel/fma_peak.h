// The most FMAs per second that this instruction set does: independent accumulators, no memory.
#pragma once

#include <omp.h>

#include "../isa.h"
#include "../parallel.h"

namespace pvc {
namespace {

// float32 FLOP/s of all threads of the caller together, measured over about `seconds`.
double measure_fma_peak(double seconds) {
    using V = Vector<float>;
    constexpr int kChains = 12;
    constexpr int kSteps = 4096;
    const int64_t threads = omp_get_max_threads();
    int64_t rounds = 1;
    for (;;) {
        const double start = omp_get_wtime();
        parallel_for(threads, [rounds](int64_t) {
            V::type sum[kChains];
#pragma GCC unroll 16
            for (int chain = 0; chain < kChains; ++chain) {
                sum[chain] = V::type{} + static_cast<float>(chain);  // equal chains would be computed once
            }
            const V::type factor = V::type{} + 0.5f, addend = V::type{} + 1.0f;
            for (int64_t step = 0; step < rounds * kSteps; ++step) {
#pragma GCC unroll 16
                for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * factor + addend;
            }
#pragma GCC unroll 16
            for (int chain = 0; chain < kChains; ++chain) asm volatile("" : : "m"(sum[chain]));
        });
        const double elapsed = omp_get_wtime() - start;
        if (elapsed >= seconds) {
            return 2.0 * kChains * kSteps * V::lanes * static_cast<double>(rounds * threads) / elapsed;
        }
        rounds = elapsed < seconds / 16 ? rounds * 8 : static_cast<int64_t>(rounds * 1.2 * seconds / elapsed) + 1;
    }
}

}  // namespace
}  // namespace pvc
