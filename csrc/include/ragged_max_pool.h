// ragged_max_pool over raw pointers; the maths is in kernels/ragged_max_pool/README.md, the layout in
// kernels/layout.py.
//
// Legend: S subnetworks, N images, C channels, H W size.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

template <typename T>
struct RaggedMaxPool {
    std::int64_t S, N, H, W;
    std::int64_t kernel, stride;  // padded by kernel / 2
    std::int64_t max_channels;
    const T* x;                    // slots of N · H · W · round_up(max_channels, 8) elements
    const std::int32_t* source;    // [S], slots of x
    const std::int32_t* channels;  // [S], 1..max_channels
    T* y;                          // S slots of N · Ho · Wo · round_up(max_channels, 8) elements

    // Height or width of y.
    std::int64_t size(std::int64_t side) const { return (side - kernel % 2) / stride + 1; }
};

// Run items [begin, end) of S · N: item s · N + n is image n of subnetwork s.
template <typename T>
void ragged_max_pool(Isa isa, const RaggedMaxPool<T>& args, std::int64_t begin, std::int64_t end);

}  // namespace metaprune
