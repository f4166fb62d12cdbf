// update_generators_ over raw pointers; the maths is in kernels/update_generators/README.md.
//
// Legend: O channels out, I channels in, K kernel taps, H hidden size, F factors; arrays are contiguous, last
// axis fastest. A row is the H numbers of one weight (o, i, k), and lies at (o · I + i) · K + k. A depthwise
// convolution of C channels and t taps is the dense one with O = C, I = t, K = 1: its basis is the same
// bytes.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

// Rows are dealt out to this many blocks whatever the number of threads, so that every sum has one order.
// Blocks are the unit of parallelism.
inline constexpr std::int64_t kUpdateBlocks = 64;

// Packed weights or gradients of one crop (kernels/layout.py): channels o.. of a panel, for input channel i
// and tap k, begin at front + o / 16 · panel + k · tap + i · step.
struct Crop {
    const float* front;
    std::int64_t cin, cout;
    std::int64_t panel, tap, step;
    std::int64_t room;  // output channels it holds, those of its padding among them
};

inline Crop packed_crop(const float* front, std::int64_t cin, std::int64_t cout, std::int64_t K,
                        bool depthwise) {
    if (depthwise) return {front, cin, cout, kPanel, 0, round_up(cout, 8), round_up(cout, 8)};
    return {front, cin, cout, K * cin * kPanel, cin * kPanel, kPanel, round_up(cout, kPanel)};
}

// What weights and momentum become: new = from_weights · weights + from_momentum · momentum + Σ_f factor[f] ·
// f, to which new weights add the old ones.
struct Combination {
    float from_weights, from_momentum;
    const float* factors;  // [F]
    const float* codes;    // [F, H], the codes of each factor times its number
};

struct UpdateGenerators {
    std::int64_t O, I, K, H, F;
    float *basis, *basis_momentum;  // [O, I, K, H]
    float *bias, *bias_momentum;    // [O, I, K]
    const Crop* crops;              // [F], of the factors' gradients
    Combination weights, momentum;

    std::int64_t row_length() const { return I * K; }
};

// Update the rows of blocks [begin, end). d_codes is [kUpdateBlocks, F, H], zero on entry: the sum over the
// blocks is the gradient of the codes of the factors, of the basis before the update.
void update_generators(Isa isa, const UpdateGenerators& args, double* d_codes, std::int64_t begin,
                       std::int64_t end);

}  // namespace metaprune
