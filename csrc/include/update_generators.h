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
};

// from_basis · basis + from_momentum · momentum + Σ_f numbers[f] · factor f; where from_momentum is zero the
// momentum is not read.
struct Combination {
    float from_basis, from_momentum;
    const float* numbers;  // [F]
};

struct Generator {
    std::int64_t O, I, K, H;
    // Written by update_generators alone.
    float* basis;                 // [O, I, K, H]
    void* basis_momentum;         // [O, I, K, H], of floats or of BFloat16
    float *bias, *bias_momentum;  // [O, I, K]
    bool half_momentum;           // whether it is of BFloat16

    std::int64_t row_length() const { return I * K; }
};

struct GenerateDelayed {
    Generator generator;
    std::int64_t S, F;
    const Factor* factors;  // [F]
    // What to add to the basis. Its numbers are [S, F]: each times one plus the product of the two codes, so
    // that they make weights, those of the bias among them, of the factors' gradients.
    Combination change;
    const float* codes;     // [S, H]
    const Crop* crops;      // [S]
    float* const* weights;  // [S]
};

// Write blocks [begin, end) of the weights of all subnetworks, zero in their padding.
void generate_delayed(Isa isa, const GenerateDelayed& args, std::int64_t begin, std::int64_t end);

struct CodeGradients {
    Generator generator;
    std::int64_t F, pending;  // the last F - pending factors are those whose codes get gradients
    const Factor* factors;    // [F]
    Combination change;       // what to add to the basis first; its numbers are not used

    // For each of the last factors, of its gradient: the sum of the rows that it is multiplied with, and its
    // products with those of the pending factors.
    std::int64_t sums() const { return (F - pending) * (generator.H + pending); }
};

// Add what blocks [begin, end) have of the sums [kUpdateBlocks, F - pending, H + pending].
void code_gradients(Isa isa, const CodeGradients& args, double* sums, std::int64_t begin, std::int64_t end);

struct UpdateGenerators {
    CodeGradients gradients;                    // of the basis before the update
    Combination basis, momentum;                // what to add to the basis, and the new momentum
    const float *basis_codes, *momentum_codes;  // [F, H], the factors' codes times their numbers
};

// Update the rows of blocks [begin, end) in place, and add to the sums as code_gradients does.
void update_generators(Isa isa, const UpdateGenerators& args, double* sums, std::int64_t begin,
                       std::int64_t end);

}  // namespace metaprune
