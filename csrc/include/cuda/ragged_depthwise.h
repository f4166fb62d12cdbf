// ragged_depthwise on a GPU over raw pointers, all of them of the device. The maths is in
// kernels/ragged_depthwise/README.md, the layouts in kernels/layout.py.
//
// Legend: S subnetworks, N images, C channels, H W size.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "storage.h"

namespace metaprune::cuda {

template <typename T>
struct RaggedDepthwise {
    std::int32_t S, N, H, W, out_H, out_W, kernel, stride, max_channels;
    std::int64_t x_slot, weight_slot, y_slot;  // elements
    const T* x;                                // slots of activations
    const T* weight;                           // slots of [taps, round_up(C_s, 8)]
    const std::int32_t* channels;              // [S], 1..max_channels
    const std::int32_t* source;                // [S], slots of x
    const std::int32_t* weight_source;         // [S]
    const float* scale;                        // [S, max_channels], or null: 1
    const float* shift;                        // [S, max_channels], or null: 0
    Clamp clamp;
    const float* input_scale;  // [slots of x, max_channels], or null: x is taken as it is
    const float* input_shift;  // likewise
    Clamp input_clamp;
    T* y;                // S slots
    std::int64_t tiles;  // depthwise_tiles
    float* partials;     // [S, tiles, 2, max_channels], or null
    double* sums;        // [S, 2, max_channels] of the bare convolution, zero beyond a width, or null
};

// The most tiles of pixels that a subnetwork of any width is cut into. `args` needs its sizes only.
template <typename T>
std::int64_t depthwise_tiles(const RaggedDepthwise<T>& args);

// Queues the kernels on a stream of the current device; null, or what is wrong.
template <typename T>
const char* ragged_depthwise(const RaggedDepthwise<T>& args, void* stream);

}  // namespace metaprune::cuda
