#include "isa.h"

#include <array>
#include <cstdlib>
#include <stdexcept>

namespace metaprune {
namespace {

constexpr std::array kLevels{Isa::avx512, Isa::avx2, Isa::portable};

bool supported(Isa isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    switch (isa) {
        case Isa::avx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx2:
            return avx2;
        case Isa::portable:
            return true;
    }
#endif
    return isa == Isa::portable;
}

}  // namespace

std::string isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::portable:
            return "portable";
    }
    throw std::logic_error("unknown instruction set");
}

Isa chosen_isa() {
    const char* forced = std::getenv("METAPRUNE_ISA");
    std::string legal;
    for (const Isa isa : kLevels) {
        if (!supported(isa)) continue;
        if (forced == nullptr || isa_name(isa) == forced) return isa;
        legal += (legal.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::runtime_error("METAPRUNE_ISA=" + std::string(forced) +
                             " cannot be used; this processor has: " + legal);
}

}  // namespace metaprune
