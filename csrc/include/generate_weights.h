// generate_weights over raw pointers; the maths is in kernels/generate_weights/README.md.
//
// Legend: S subnetworks, O channels out, I channels in, K kernel taps, H hidden size; arrays are contiguous,
// last axis fastest. A depthwise convolution of C channels is the dense one with O = 1, I = C, cin[s] = C_s
// and cout[s] = 1: basis and packed weights are the same bytes. Only its scale differs: it runs along I.

#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace metaprune {

// The rows of the basis are dealt out to this many blocks whatever the number of threads, so that every sum
// has one order. Blocks are the unit of parallelism and cost about the same.
inline constexpr std::int64_t kBlocks = 64;

// Codes and their gradients have rows of this many floats, zero beyond H.
constexpr std::int64_t padded_hidden(std::int64_t H) { return (H + 15) / 16 * 16; }

template <typename T>
struct GenerateWeights {
    std::int64_t S, O, I, K, H;
    const T* basis;            // [O, I, K, H]
    const T* bias;             // [O, I, K], forward only
    const float* codes;        // [S, padded_hidden(H)]
    const T* scale;            // [S, O], or [S, I] if depthwise, or null
    bool depthwise;            // O = 1 and scale along I
    const std::int32_t* cin;   // [S], 1..I
    const std::int32_t* cout;  // [S], 1..O
    std::int64_t slot;         // elements from the weights of one subnetwork to those of the next
};

// Write blocks [begin, end) of weight [S, slot]: fronts [cout_s, K, round_up(cin_s, 8)] with zero pad
// channels.
template <typename T>
void generate_weights(Isa isa, const GenerateWeights<T>& args, T* weight, std::int64_t begin,
                      std::int64_t end);

template <typename T>
struct GenerateWeightsGradients {
    const T* weight;  // [S, slot], given; pad channels are not read
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
