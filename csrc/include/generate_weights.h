// generate_weights over raw pointers; the maths is in kernels/generate_weights/README.md.
//
// Legend: S subnetworks, O channels out, I channels in, K kernel taps, H hidden size; arrays are contiguous,
// last axis fastest. A depthwise convolution of C channels and t taps is the dense one with O = C, I = t,
// K = 1 and cin[s] = t: its basis is the same bytes. Only its weights lie differently.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

// The rows of the basis are dealt out to this many blocks whatever the number of threads, so that every sum
// has one order. Blocks are the unit of parallelism and cost about the same.
inline constexpr std::int64_t kBlocks = 64;

// Codes and their gradients have rows of this many floats, zero beyond H: two registers at a time.
constexpr std::int64_t padded_hidden(std::int64_t H) { return round_up(H, 32); }

template <typename T>
struct GenerateWeights {
    std::int64_t S, O, I, K, H;
    const T* basis;      // [O, I, K, H]
    const T* bias;       // [O, I, K], forward only
    const float* codes;  // [S, padded_hidden(H)]
    bool depthwise;
    const std::int32_t* cin;   // [S], 1..I; not read if depthwise
    const std::int32_t* cout;  // [S], 1..O
    std::int64_t slot;         // elements from the weights of one subnetwork to those of the next
};

// Write blocks [begin, end) of weight [S, slot]: the fronts [ceil(cout_s/16), K, ceil(cin_s/p), 16, p], or
// [I, round_up(cout_s, 8)] if depthwise, zero in their padding.
template <typename T>
void generate_weights(Isa isa, const GenerateWeights<T>& args, T* weight, std::int64_t begin,
                      std::int64_t end);

template <typename T>
struct GenerateWeightsGradients {
    const T* weight;  // [S, slot], given; padding does not count
    T* basis;         // [O, I, K, H], zero outside all crops
    T* bias;          // [O, I, K], likewise
    float* codes;  // [kBlocks, S, padded_hidden(H)], zero on entry: the sum over the blocks is the gradient
};

// Write blocks [begin, end) of the gradients.
template <typename T>
void generate_weights_backward(Isa isa, const GenerateWeights<T>& args,
                               const GenerateWeightsGradients<T>& gradients, std::int64_t begin,
                               std::int64_t end);

}  // namespace metaprune
