// The gradient of ragged_depthwise over raw pointers; the maths is in kernels/ragged_depthwise/README.md, the
// layout in kernels/layout.py.
//
// Legend: S subnetworks, N images, C channels, H W size.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "isa.h"
#include "storage.h"

namespace metaprune {

template <typename T>
struct RaggedDepthwiseBackward {
    std::int64_t S, slots, N, H, W;
    std::int64_t kernel, stride;  // padded by kernel / 2
    std::int64_t max_channels;
    const T* grad;                      // S slots like those of y, or null: 0
    const double* grad_sums;            // [S, 2, max_channels], or null: 0
    const T* y;                         // S slots of activations; only read if there is grad_sums
    const T* x;                         // slots of activations
    const std::int32_t* channels;       // [S], 1..max_channels, equal for the readers of a slot
    const std::int32_t* readers;        // [S], subnetworks by the slot of x they read
    const std::int32_t* first_reader;   // [slots + 1], of each slot in `readers`
    const T* weight;                    // slots of `weight_slot` elements
    const std::int32_t* weight_source;  // [S]
    std::int64_t weight_slot;
    const float* input_scale;  // [slots, max_channels], or null: x is taken as it is
    const float* input_shift;  // likewise
    Clamp input_clamp;
    T* grad_x;            // slots of activations, or null
    bool streams;         // it is written past the caches
    double* weight_sums;  // [S, groups(), kernel², padded()], zero on entry: the sum over the groups is the
                          // gradient
    double* input_sums;   // [slots, groups(), 2, padded()] of shift and scale, likewise; null without them

    std::int64_t out(std::int64_t side) const { return (side + kernel / 2 * 2 - kernel) / stride + 1; }
    std::int64_t padded() const { return round_up(max_channels, kPanel); }
    // Images of one item of work. It depends on the shapes alone, because sums are added item by item.
    std::int64_t group() const { return 1 + 195 / (H * W); }
    std::int64_t groups() const { return (N + group() - 1) / group(); }
};

// Run items [begin, end) of slots · groups(): item l · groups() + g is group g of slot l. Slots without
// readers are left alone.
template <typename T>
void ragged_depthwise_backward(Isa isa, const RaggedDepthwiseBackward<T>& args, std::int64_t begin,
                               std::int64_t end);

}  // namespace metaprune
