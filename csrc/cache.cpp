#include "cache.h"

#include <unistd.h>

namespace pvc {

int64_t l1_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    static const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return bytes > 0 ? bytes : 0;
#else
    return 0;
#endif
}

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return bytes > 0 ? bytes : 0;
#else
    return 0;
#endif
}

}  // namespace pvc
