#include "parallel.h"

#include <pthread.h>

namespace pvc {
namespace {

bool forked = false;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

}  // namespace pvc
