// A chain of convolutions over raw pointers: ragged_conv, ragged_depthwise (one stage each) and fused_block
// (two or three). The maths is in kernels/<op>/README.md, the layouts in kernels/layout.py.
//
// Legend: S subnetworks, N images, C channels, H W size.

#pragma once

#include <cstdint>

#include "clamp.h"
#include "isa.h"
#include "storage.h"

namespace metaprune {

// One convolution, padded by kernel / 2: y = clamp(conv(x) · scale + shift).
template <typename T>
struct Stage {
    bool depthwise;
    std::int64_t kernel, stride;
    Clamp clamp;
    std::int64_t max_channels;     // out
    const std::int32_t* channels;  // [S], 1..max_channels
    const T* weight;               // slots of `weight_slot` elements
    std::int64_t weight_slot;
    const std::int32_t* weight_source;  // [S]
    const float* scale;                 // [S, max_channels], or null: 1
    const float* shift;                 // [S, max_channels], or null: 0
};

inline constexpr int kMaxStages = 3;

template <typename T>
struct Chain {
    std::int64_t S, N, H, W;
    std::int64_t max_channels;     // of x
    const T* x;                    // slots of activations
    const std::int32_t* source;    // [S], slots of x
    const std::int32_t* channels;  // [S], 1..max_channels
    const float* input_scale;      // [slots of x, max_channels], or null: x is taken as it is
    const float* input_shift;      // likewise
    Clamp input_clamp;
    int stages;
    Stage<T> stage[kMaxStages];
    const T* shortcut;                    // slots like those of y, added before the last clamp, or null
    const std::int32_t* shortcut_source;  // [S]
    T* y;                                 // S slots
    bool streams;                         // y is written past the caches
    std::int64_t group;                   // images of one item of work
    double* sums;  // [S, groups, 2, max channels of y] of the bare last convolution, or null

    std::int64_t groups() const { return (N + group - 1) / group; }
    // Height or width after the first `stages` convolutions.
    std::int64_t size(std::int64_t side, int count) const {
        for (int i = 0; i < count; ++i) {
            side = (side + stage[i].kernel / 2 * 2 - stage[i].kernel) / stage[i].stride + 1;
        }
        return side;
    }
};

// Images that are worth one item of work: it depends on the shapes alone, because sums are added item by
// item.
template <typename T>
std::int64_t images_per_group(const Chain<T>& chain);

// Run items [begin, end) of S · groups(): item s · groups() + g is group g of subnetwork s.
template <typename T>
void run_chain(Isa isa, const Chain<T>& chain, std::int64_t begin, std::int64_t end);

}  // namespace metaprune
