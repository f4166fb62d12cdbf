// The gradient of ragged_normalise over raw pointers; the maths is in kernels/ragged_normalise/README.md, the
// layout in kernels/layout.py.
//
// Legend: S subnetworks, C channels. dz is the gradient of y before the activation.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "isa.h"
#include "storage.h"

namespace metaprune {

template <typename T>
struct RaggedNormaliseBackward {
    std::int64_t S, pixels;  // of all images
    std::int64_t max_channels;
    const T* grad;                 // S slots of slot() elements
    const T* y;                    // S slots
    Clamp clamp;                   // of y: on its bounds and beyond dz is zero
    const std::int32_t* channels;  // [S], 1..max_channels

    std::int64_t slot() const { return pixels * round_up(max_channels, 8); }
    std::int64_t padded() const { return round_up(max_channels, kPanel); }
    // Pixels of one item of work: about a hundred kilobytes. It depends on the shapes alone, because sums are
    // added item by item.
    std::int64_t chunk() const { return 1 + 32768 / max_channels; }
    std::int64_t chunks() const { return (pixels + chunk() - 1) / chunk(); }
};

// Who reads each slot of a buffer: readers[first[l] .. first[l + 1]), equal in channels.
struct SlotReaders {
    std::int64_t slots;
    const std::int32_t *first, *readers;  // [slots + 1], [S]
};

// Where the gradients of x, scale and shift go.
template <typename T>
struct NormaliseGradients {
    const T* x;          // readers.slots slots
    const float* scale;  // [S, max_channels]
    SlotReaders readers;
    T* grad_x;                     // like x
    double* sums;                  // [S, chunks(), 2, padded()] of shift and scale, zero on entry
    const std::int32_t* shortcut;  // [S]: the slot of grad_shortcut that is dz alone, or -1; null: all are -1
    T* grad_shortcut;              // slots like those of x, or null
};

// Run items [begin, end) of slots · chunks(): item l · chunks() + i is chunk i of slot l. Slots without
// readers are left alone.
template <typename T>
void ragged_normalise_backward(Isa isa, const RaggedNormaliseBackward<T>& args,
                               const NormaliseGradients<T>& gradients, std::int64_t begin, std::int64_t end);

// Likewise the sum of dz over the readers of each slot of the shortcut; slots of fewer than two are left
// alone.
template <typename T>
void ragged_shortcut_backward(Isa isa, const RaggedNormaliseBackward<T>& args, const SlotReaders& readers,
                              T* grad_shortcut, std::int64_t begin, std::int64_t end);

}  // namespace metaprune
