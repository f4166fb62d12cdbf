#include "generate_weights.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "workspace.h"

namespace metaprune {
namespace {

// One subnetwork's share of a run of tiles.
struct Kept {
    std::int64_t subnetwork;
    std::int64_t rows;               // channels of the panel it keeps, 1..kPanel
    std::int64_t stored;             // channels of the panel its front has room for
    std::int64_t cin;                // input channels it keeps
    std::int64_t offset, tap, step;  // the weights of (tap k, channel i) begin at offset + k·tap + i·step
};

// A tile is a panel's rows for one tap and this many input channels.
constexpr std::int64_t kPair = 2;

// Dense weights of more bytes than this would leave the caches before anybody reads them.
constexpr std::int64_t kStreamed = 1 << 20;

// The pairs of input channels in a run, the unit in which tiles are dealt out to the blocks.
template <typename T>
std::int64_t run_pairs(const GenerateWeights<T>& a) {
    constexpr std::int64_t kRunBytes = 1 << 20, kRunsPerBlock = 4;
    const std::int64_t pairs = round_up(a.O, kPanel) / kPanel * (round_up(a.I, kPair) / kPair);
    const std::int64_t pair_bytes =
        kPanel * kPair * a.K * std::max<std::int64_t>(a.H, 1) * static_cast<std::int64_t>(sizeof(T));
    return std::max(1 + std::min(kRunBytes / pair_bytes, pairs / (kBlocks * kRunsPerBlock)), 1 + 7 / a.K);
}

// Working memory of one thread.
struct Scratch {
    std::int64_t pairs;         // in a run
    bool tiles;                 // whether there are matrix tiles
    bool streamed;              // whether weights are stored past the caches
    float* tile;                // [kPair, kPanel, padded_hidden(H)], or with the last two axes exchanged,
                                // or [kPair, words of a row, kPanel] for matrix tiles
    float* bias;                // [a run's channels and taps, rounded up to 32, kPanel]
    float* gradients;           // [S, kPair, kPanel]
    float* sums;                // [kPair, 16, kPanel], of matrix tiles
    BFloat16* codes;            // [S rounded up to 16, padded_hidden(H)], likewise
    Kept* kept;                 // [S]
    const std::int32_t* order;  // [S], the subnetworks with more input channels first
};

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "generate_weights.inc"
#include "for_each_isa.h"

namespace metaprune {
namespace {

template <typename T>
Scratch make_scratch(const GenerateWeights<T>& a, bool tiles) {
    Scratch scratch{};
    scratch.pairs = run_pairs(a);
    scratch.tiles = tiles;
    const std::int64_t tile = kPair * kPanel * padded_hidden(a.H),
                       bias = round_up(scratch.pairs * kPair * a.K, 32) * kPanel,
                       gradients = a.S * kPair * kPanel, sums = kPair * 16 * kPanel,
                       codes = round_up(a.S, 16) * padded_hidden(a.H) / 2;
    const auto floats = static_cast<std::size_t>(tile + bias + gradients + sums + codes);
    const auto S = static_cast<std::size_t>(a.S);
    std::byte* memory = workspace(floats * sizeof(float) + S * (sizeof(Kept) + sizeof(std::int32_t)));
    scratch.tile = reinterpret_cast<float*>(memory);
    scratch.bias = scratch.tile + tile;
    scratch.gradients = scratch.bias + bias;
    scratch.sums = scratch.gradients + gradients;
    scratch.codes = reinterpret_cast<BFloat16*>(scratch.sums + sums);
    scratch.kept = reinterpret_cast<Kept*>(scratch.sums + sums + codes);
    auto* order = reinterpret_cast<std::int32_t*>(scratch.kept + a.S);
    std::iota(order, order + a.S, 0);
    if (!a.depthwise) {
        // Ties by number: one order whatever the sorting algorithm.
        std::sort(order, order + a.S, [&](std::int32_t s, std::int32_t t) {
            return a.cin[s] != a.cin[t] ? a.cin[s] > a.cin[t] : s < t;
        });
    }
    scratch.order = order;
    return scratch;
}

}  // namespace

template <typename T>
void generate_weights(Isa isa, const GenerateWeights<T>& args, T* weight, std::int64_t begin,
                      std::int64_t end) {
    METAPRUNE_CALL(isa, generate_weights(args, weight, make_scratch(args, isa == Isa::amx), begin, end));
}

template <typename T>
void generate_weights_backward(Isa isa, const GenerateWeights<T>& args,
                               const GenerateWeightsGradients<T>& gradients, std::int64_t begin,
                               std::int64_t end) {
    METAPRUNE_CALL(
        isa, generate_weights_backward(args, gradients, make_scratch(args, isa == Isa::amx), begin, end));
}

#define INSTANTIATE(T)                                                                              \
    template void generate_weights(Isa, const GenerateWeights<T>&, T*, std::int64_t, std::int64_t); \
    template void generate_weights_backward(Isa, const GenerateWeights<T>&,                         \
                                            const GenerateWeightsGradients<T>&, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
