// Splits independent tasks over the OpenMP threads of the caller.
//
// Compiled with -fopenmp and linked without it: the symbols bind to the libgomp that torch has loaded, one pool for
// both. There is no num_threads clause (it makes libgomp rebuild its pool); the caller asks torch.get_num_threads()
// first, which sets the count for the calling thread. A task writes outputs that no other task writes, so results do
// not depend on which thread runs it.
#pragma once

#include <omp.h>

#include <cstdint>

#include "arena.h"

namespace pvc {

// True in a child made by fork(): libgomp's threads do not exist there and a parallel region would hang.
bool in_forked_child();

namespace {

// Calls body(task) for task in [0, tasks), in parallel and in any order. Throws std::bad_alloc if a body threw.
template <typename Body>
void parallel_for(int64_t tasks, const Body& body) {
    if (tasks == 1 || omp_get_max_threads() == 1 || in_forked_child()) {
        for (int64_t task = 0; task < tasks; ++task) body(task);
        return;
    }
    int64_t next = 0;
    bool failed = false;
#pragma omp parallel
    {
        try {
            for (;;) {
                const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
                if (task >= tasks) break;
                body(task);
            }
        } catch (...) {  // an exception must not leave the region; scratch memory is the only thing that can fail
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        }
    }
    if (failed) throw_bad_alloc();
}

}  // namespace
}  // namespace pvc
