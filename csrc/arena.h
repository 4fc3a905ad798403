// Scratch memory that is kept and reused: one buffer per thread and slot, grown when a larger one is asked for.
//
// Fresh pages cost more than the arithmetic of a small convolution, so nothing is returned to the system before the
// thread ends. Plain functions, so that files compiled for one instruction set need no container from std.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pvc {

// Buffers of one thread that are alive at the same time have different slots.
enum class Scratch : int {
    shared_weights,
    shared_partials,
    tables,
    tile_input,
    tile_accumulators,
    tile_output,
    tile_rows,
    tile_lists,
    tile_pooled,
    tile_codes,
    tile_narrowed,
    count
};

// `bytes` of uninitialised memory, aligned to 64 bytes; valid until this thread asks for the same slot again.
// Throws std::bad_alloc.
void* scratch_bytes(Scratch slot, size_t bytes);

[[noreturn]] void throw_bad_alloc();

template <typename T>
static inline T* scratch(Scratch slot, int64_t count) {
    return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace pvc
