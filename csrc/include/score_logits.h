// score_logits over raw pointers; the maths is in kernels/score_logits/README.md, the layout of x in
// kernels/layout.py.
//
// Legend: S subnetworks, N images, C channels, T classes.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

// x is T, the classifier W.
template <typename T, typename W>
struct ScoreLogits {
    std::int64_t S, N, pixels;  // of one image
    std::int64_t max_channels, classes;
    const T* x;                    // slots of N · pixels · round_up(max_channels, 8) elements
    const std::int32_t* source;    // [S], slots of x
    const std::int32_t* channels;  // [S], 1..max_channels
    const W* weight;               // [T, max_channels]
    const float* bias;             // [T]
    const std::int64_t* labels;    // [N], 0..classes - 1
    bool* correct;                 // [S, N]
    double* loss;                  // [S, N]

    // Images of one item of work: enough to use a row of the classifier often once it is there.
    static constexpr std::int64_t kGroup = 32;
    std::int64_t groups() const { return (N + kGroup - 1) / kGroup; }
};

// Run items [begin, end) of S · groups(): item s · groups() + g is group g of subnetwork s.
template <typename T, typename W>
void score_logits(Isa isa, const ScoreLogits<T, W>& args, std::int64_t begin, std::int64_t end);

}  // namespace metaprune
