#include "bandwidth.h"

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"

namespace pvc {

double measure_copy_bandwidth(double seconds) {
    constexpr int64_t kBytes = int64_t{128} << 20, kPiece = int64_t{1} << 20;
    const std::unique_ptr<char, decltype(&std::free)> from(static_cast<char*>(std::malloc(kBytes)), &std::free);
    const std::unique_ptr<char, decltype(&std::free)> to(static_cast<char*>(std::malloc(kBytes)), &std::free);
    if (from == nullptr || to == nullptr) throw std::bad_alloc();
    const auto copy = [&](int64_t piece) {
        std::memcpy(to.get() + piece * kPiece, from.get() + piece * kPiece, kPiece);
    };
    parallel_for(kBytes / kPiece, [&](int64_t piece) { std::memset(from.get() + piece * kPiece, 1, kPiece); });
    parallel_for(kBytes / kPiece, copy);  // the pages exist from here on
    int rounds = 0;
    const double start = omp_get_wtime();
    double elapsed = 0;
    do {
        parallel_for(kBytes / kPiece, copy);
        ++rounds;
        elapsed = omp_get_wtime() - start;
    } while (elapsed < seconds);
    return 2.0 * static_cast<double>(kBytes) * rounds / elapsed;
}

}  // namespace pvc
