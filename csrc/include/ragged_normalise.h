// ragged_normalise over raw pointers; the maths is in kernels/ragged_normalise/README.md, the layout in
// kernels/layout.py.
//
// Legend: S subnetworks, C channels.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "isa.h"
#include "storage.h"

namespace metaprune {

template <typename T>
struct RaggedNormalise {
    std::int64_t S, pixels;  // of all images
    std::int64_t max_channels;
    const T* x;                    // slots of `slot()` elements
    const std::int32_t* source;    // [S], slots of x
    const std::int32_t* channels;  // [S], 1..max_channels
    const float* scale;            // [S, max_channels]
    const float* shift;            // [S, max_channels]
    Clamp clamp;
    const T* shortcut;                    // slots like those of x, or null
    const std::int32_t* shortcut_source;  // [S], slots of shortcut
    T* y;                                 // S slots

    std::int64_t slot() const { return pixels * round_up(max_channels, 8); }
    // Pixels of one item of work: about a hundred kilobytes.
    std::int64_t chunk() const { return 1 + 32768 / max_channels; }
    std::int64_t chunks() const { return (pixels + chunk() - 1) / chunk(); }
};

// Run items [begin, end) of S · chunks(): item s · chunks() + i is chunk i of subnetwork s.
template <typename T>
void ragged_normalise(Isa isa, const RaggedNormalise<T>& args, std::int64_t begin, std::int64_t end);

}  // namespace metaprune
