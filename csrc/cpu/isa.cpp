#include "isa.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace metaprune {
namespace {

constexpr std::array<std::pair<Isa, const char*>, 5> kLevels{{
    {Isa::amx, "amx"},
    {Isa::avx512_bf16, "avx512_bf16"},
    {Isa::avx512, "avx512"},
    {Isa::avx2, "avx2"},
    {Isa::portable, "portable"},
}};

#if defined(__x86_64__)
// The processor has tiles of bfloat16 and the operating system lets this process use them.
bool has_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTileBf16) != 0 &&
           (edx & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool supported(Isa isa) {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    switch (isa) {
        case Isa::amx:
            return avx512_bf16 && has_tiles();
        case Isa::avx512_bf16:
            return avx512_bf16;
        case Isa::avx512:
            return avx512;
        case Isa::avx2:
            return avx2;
        case Isa::portable:
            return true;
    }
    return false;
}
#else
bool supported(Isa isa) { return isa == Isa::portable; }
#endif

}  // namespace

std::string isa_name(Isa isa) {
    for (const auto& [level, name] : kLevels) {
        if (level == isa) return name;
    }
    throw std::logic_error("unknown instruction set");
}

std::vector<Isa> supported_isas() {
    static const std::vector<Isa> found = [] {
        std::vector<Isa> levels;
        for (const auto& [level, name] : kLevels) {
            if (supported(level)) levels.push_back(level);
        }
        return levels;
    }();
    return found;
}

Isa chosen_isa() {
    const char* forced = std::getenv("METAPRUNE_ISA");
    if (forced == nullptr) return supported_isas().front();
    std::string legal;
    for (const Isa isa : supported_isas()) {
        if (isa_name(isa) == forced) return isa;
        legal += (legal.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::runtime_error("METAPRUNE_ISA=" + std::string(forced) +
                             " cannot be used; this processor has: " + legal);
}

}  // namespace metaprune
