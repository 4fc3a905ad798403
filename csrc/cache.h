// What the machine's caches hold, where a fixed size (isa.h) would leave much of a larger one unused.
#pragma once

#include <cstdint>

namespace pvc {

// Of the first-level data cache and of the second-level cache of one core; 0 where the system does not say.
int64_t l1_bytes();
int64_t l2_bytes();

}  // namespace pvc
