// The gradient of ragged_max_pool over raw pointers; the maths is in kernels/ragged_max_pool/README.md, the
// layout in kernels/layout.py.
//
// Legend: S subnetworks, N images, C channels, H W size.

#pragma once

#include <cstdint>

#include "isa.h"
#include "ragged_max_pool.h"
#include "storage.h"

namespace metaprune {

template <typename T>
struct RaggedMaxPoolBackward {
    RaggedMaxPool<T> pool;             // but for its y
    std::int64_t slots;                // of x
    const std::int32_t* readers;       // [S], subnetworks by the slot of x they read, equal in channels
    const std::int32_t* first_reader;  // [slots + 1], of each slot in `readers`
    const T* grad;                     // S slots like those of y
    T* grad_x;                         // slots like those of x
};

// Run items [begin, end) of slots · N: item l · N + n is image n of slot l. Slots without readers are left
// alone.
template <typename T>
void ragged_max_pool_backward(Isa isa, const RaggedMaxPoolBackward<T>& args, std::int64_t begin,
                              std::int64_t end);

}  // namespace metaprune
