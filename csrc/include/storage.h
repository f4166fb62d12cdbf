// How numbers lie in memory. All arithmetic is in float.

#pragma once

#include <cstdint>

namespace metaprune {

struct BFloat16 {
    std::uint16_t bits;
};

// On a GPU only.
struct Float16 {
    std::uint16_t bits;
};

template <typename T>
inline constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

// Weights of a dense convolution come in panels of this many output channels: kernels/layout.py.
inline constexpr std::int64_t kPanel = 16;

// Input channels in one 32-bit word of a panel.
template <typename T>
inline constexpr std::int64_t kPerWord = 4 / static_cast<std::int64_t>(sizeof(T));

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

}  // namespace metaprune
