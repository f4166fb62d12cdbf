// update_generators_ over raw pointers; the maths is in kernels/update_generators/README.md.
//
// Legend: S subnetworks, O channels out, I channels in, K kernel taps, H hidden size; arrays are contiguous,
// last axis fastest. A row is the H numbers of one weight (o, i, k), and lies at (o · I + i) · K + k.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

// Rows are dealt out to this many blocks, each of consecutive rows, whatever the number of threads, so that
// every sum has one order. Blocks are the unit of parallelism.
inline constexpr std::int64_t kUpdateBlocks = 64;

struct UpdateGenerators {
    std::int64_t S, rows, H;
    std::int64_t row_length;            // I · K, rows of one output channel
    float *basis, *basis_momentum;      // [rows, H]
    float *bias, *bias_momentum;        // [rows]
    const float* codes;                 // [S, H]
    const float* const* grads;          // [S] pointers to [cout[s], length[s]]
    const std::int64_t *cout, *length;  // [S]: output channels, and rows of each, in the crop
    float lr, momentum, weight_decay;

    std::int64_t first_row(std::int64_t block) const { return rows * block / kUpdateBlocks; }
};

// Update the rows of blocks [begin, end). d_codes is [kUpdateBlocks, S, H], zero on entry: the sum over the
// blocks is the gradient of the codes, of the basis before the update.
void update_generators(Isa isa, const UpdateGenerators& args, double* d_codes, std::int64_t begin,
                       std::int64_t end);

}  // namespace metaprune
