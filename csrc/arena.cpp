#include "arena.h"

#include <cstdlib>
#include <new>

namespace pvc {
namespace {

constexpr size_t kAlignment = 64;

struct Arena {
    void* buffer[static_cast<int>(Scratch::count)] = {};
    size_t capacity[static_cast<int>(Scratch::count)] = {};

    ~Arena() {
        for (void* each : buffer) std::free(each);
    }
};

thread_local Arena arena;

}  // namespace

void* scratch_bytes(Scratch slot, size_t bytes) {
    const int index = static_cast<int>(slot);
    if (bytes > arena.capacity[index]) {
        const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        std::free(arena.buffer[index]);
        arena.buffer[index] = nullptr;
        arena.capacity[index] = 0;
        void* fresh = std::aligned_alloc(kAlignment, rounded);
        if (fresh == nullptr) throw_bad_alloc();
        arena.buffer[index] = fresh;
        arena.capacity[index] = rounded;
    }
    return arena.buffer[index];
}

void throw_bad_alloc() { throw std::bad_alloc(); }

}  // namespace pvc
