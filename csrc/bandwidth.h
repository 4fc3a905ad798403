// Copy bandwidth of the memory, for rooflines.
#pragma once

namespace pvc {

// Bytes read plus bytes written per second, all threads of the caller together copying buffers larger than any cache,
// measured over about `seconds`. Throws std::bad_alloc.
double measure_copy_bandwidth(double seconds);

}  // namespace pvc
