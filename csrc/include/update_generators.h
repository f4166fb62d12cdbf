// Training weight generators over raw pointers; the maths is in kernels/update_generators/README.md.
//
// Legend: S subnetworks, O channels out, I channels in, K kernel taps, H hidden size, F factors; arrays are
// contiguous, last axis fastest. A row is the H numbers of one weight (o, i, k), and lies at (o · I + i) · K
// + k. A depthwise convolution of C channels and t taps is the dense one with O = C, I = t, K = 1: its basis
// is the same bytes.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

// Rows are dealt out to this many blocks whatever the number of threads, so that every sum has one order.
// Blocks are the unit of parallelism.
inline constexpr std::int64_t kUpdateBlocks = 64;

// Where the weights of one crop lie (kernels/layout.py): those of input channel i and tap k for channels o..
// of a panel begin at o / 16 · panel + k · tap + i · step.
struct Crop {
    std::int64_t cin, cout;
    std::int64_t panel, tap, step;
    std::int64_t room;  // output channels there is room for, padding among them
    std::int64_t size;  // numbers in all
};

inline Crop packed_crop(std::int64_t cin, std::int64_t cout, std::int64_t K, bool depthwise) {
    const std::int64_t room = round_up(cout, depthwise ? 8 : kPanel), size = room * K * cin;
    if (depthwise) return {cin, cout, kPanel, 0, room, room, size};
    return {cin, cout, K * cin * kPanel, cin * kPanel, kPanel, room, size};
}

// What one subnetwork adds to the gradient of the basis: its packed gradient times its code.
struct Factor {
    Crop crop;
    const float* grad;
    const float* code;  // [H]
};

// What steps without a gradient make of a weight w and its momentum m:
// w + change_from_weight · w + change_from_momentum · m and momentum_from_weight · w + momentum_from_momentum
// · m.
struct Drift {
    float change_from_weight, change_from_momentum, momentum_from_weight, momentum_from_momentum;
};

// As many as there are values of `written`: whatever it holds, nothing out of bounds is read.
inline constexpr std::int64_t kDrifts = 256;

struct Generator {
    std::int64_t O, I, K, H;
    std::int64_t taps;  // rows that are written together
    // Written by update_generators alone.
    float* basis;                 // [O, I, K, H]
    void* basis_momentum;         // [O, I, K, H], of floats or of BFloat16
    float *bias, *bias_momentum;  // [O, I, K]
    bool half_momentum;           // whether it is of BFloat16
    // The step after which rows were last written, and what has become of those since.
    const std::uint8_t* written;  // [O, I · K / taps]
    const Drift* drift;           // [kDrifts]

    std::int64_t row_length() const { return I * K; }
};

struct GenerateDelayed {
    Generator generator;
    std::int64_t S;
    const float* codes;     // [S, H]
    const Crop* crops;      // [S]
    float* const* weights;  // [S]
};

// Write blocks [begin, end) of the weights of all subnetworks, zero in their padding.
void generate_delayed(Isa isa, const GenerateDelayed& args, std::int64_t begin, std::int64_t end);

struct UpdateGenerators {
    Generator generator;
    std::int64_t F;
    const Factor* factors;  // [F]
    bool everywhere;        // whether rows in no crop are updated, too
    float lr, momentum, weight_decay;
};

// Update rows of blocks [begin, end) in place, and add to the sums [kUpdateBlocks, F, H] the gradients of the
// factors' codes, of the basis before this step. `written` is left as it is.
void update_generators(Isa isa, const UpdateGenerators& args, double* sums, std::int64_t begin,
                       std::int64_t end);

}  // namespace metaprune
