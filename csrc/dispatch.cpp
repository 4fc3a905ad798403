#include "dispatch.h"

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

std::string join(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

const Isa* find(const std::string& name, const std::string& given_by) {
    for (const Isa& isa : kIsas) {
        if (name != isa.name) continue;
        if (isa.supported()) return &isa;
        throw std::invalid_argument(given_by + "=" + name +
                                    " cannot run on this machine; it supports: " + join(supported_isas()));
    }
    throw std::invalid_argument(given_by + "=" + name +
                                " is not an instruction set of this build; expected one of: " + join(compiled_isas()));
}

const Isa* select_first() {
    const char* wanted = std::getenv("PYVOLCONV_ISA");
    if (wanted != nullptr && *wanted != '\0') return find(wanted, "PYVOLCONV_ISA");
    for (const Isa& isa : kIsas) {
        if (isa.supported()) return &isa;
    }
    return nullptr;  // not reached: the baseline is always supported
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

void use_isa(const std::string& name) { selected.store(find(name, "isa"), std::memory_order_release); }

}  // namespace pvc
