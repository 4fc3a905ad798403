#include "cache.h"

#include <unistd.h>

namespace pvc {
namespace {

#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
int64_t ask(int name) {
    const long bytes = sysconf(name);
    return bytes > 0 ? bytes : 0;
}

const int64_t l1 = ask(_SC_LEVEL1_DCACHE_SIZE), l2 = ask(_SC_LEVEL2_CACHE_SIZE);
#else
const int64_t l1 = 0, l2 = 0;
#endif

}  // namespace

int64_t l1_bytes() { return l1; }

int64_t l2_bytes() { return l2; }

}  // namespace pvc
