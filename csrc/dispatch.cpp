#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pvc {
namespace {

struct Isa {
    const char* name;
    const KernelTable* kernels;
    bool (*supported)();
};

// __builtin_cpu_supports asks cpuid and, for AVX and above, the register state that the OS has enabled (xgetbv).
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &kernels_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("fma");
     }},
    {"avx2", &kernels_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &kernels_baseline, [] { return true; }},
};

std::atomic<const Isa*> selected{nullptr};

// Tile registers are 8 KB of state of every thread, which Linux keeps only for processes that asked for it.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    return (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

std::string join(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

[[noreturn]] void refuse_unknown(const std::string& name, const std::string& given_by) {
    throw std::invalid_argument(given_by + "=" + name +
                                " is not an instruction set of this build; expected one of: " + join(compiled_isas()));
}

const Isa* find(const std::string& name) {
    for (const Isa& isa : kIsas) {
        if (name != isa.name) continue;
        if (isa.supported()) return &isa;
        throw std::invalid_argument("isa=" + name +
                                    " cannot run on this machine; it supports: " + join(supported_isas()));
    }
    refuse_unknown(name, "isa");
}

// The best instruction set of this machine that is not above the one the environment names.
const Isa* select_first() {
    const char* variable = std::getenv("PYVOLCONV_ISA");
    const std::string cap = variable == nullptr ? "" : variable;
    bool below_cap = cap.empty();
    for (const Isa& isa : kIsas) {
        below_cap = below_cap || cap == isa.name;
        if (below_cap && isa.supported()) return &isa;
    }
    refuse_unknown(cap, "PYVOLCONV_ISA");  // the baseline is always supported, so the name was not found
}

const Isa& current() {
    const Isa* isa = selected.load(std::memory_order_acquire);
    if (isa == nullptr) {
        isa = select_first();
        selected.store(isa, std::memory_order_release);
    }
    return *isa;
}

}  // namespace

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) names.emplace_back(isa.name);
    return names;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) {
        if (isa.supported()) names.emplace_back(isa.name);
    }
    return names;
}

std::string current_isa() { return current().name; }

const KernelTable& current_kernels() { return *current().kernels; }

bool has_bfloat16() {
#if defined(__x86_64__)
    return current_kernels().bfloat16.forward != nullptr && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool has_matrix_unit() {
    static const bool allowed = may_use_tiles();
    return current_kernels().split.forward != nullptr && allowed;
}

void use_isa(const std::string& name) { selected.store(find(name), std::memory_order_release); }

}  // namespace pvc
