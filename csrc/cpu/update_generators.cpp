#include "update_generators.h"

#include <cstddef>
#include <cstdint>

#include "workspace.h"

namespace metaprune {
namespace {

// A run is a panel of output channels and this many rows of each, so few that what they add to a code's
// gradient may be summed in float.
constexpr std::int64_t kStrip = 128;

// Rows of one output channel that are at hand at a time.
constexpr std::int64_t kTileRows = 16;

// Working memory of one thread.
struct Scratch {
    float* strips;       // [F, kPanel, kStrip]: the factors' gradients for a run, zero beyond a crop
    float* tile;         // [kTileRows, padded(H)]
    float* d_codes;      // [F, padded(H)]
    std::int64_t* kept;  // [F], the factors whose crop holds some of what is worked on
};

// Room for the H numbers of a row in whole registers.
constexpr std::int64_t padded(std::int64_t H) { return round_up(H, 16); }

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "update_generators.inc"
#include "for_each_isa.h"

namespace metaprune {

void update_generators(Isa isa, const UpdateGenerators& args, double* d_codes, std::int64_t begin,
                       std::int64_t end) {
    const auto F = static_cast<std::size_t>(args.F), row = static_cast<std::size_t>(padded(args.H));
    const std::size_t strips = F * kPanel * kStrip, tile = kTileRows * row;
    std::byte* memory = workspace((strips + tile + F * row) * sizeof(float) + F * sizeof(std::int64_t));
    Scratch scratch{};
    scratch.strips = reinterpret_cast<float*>(memory);
    scratch.tile = scratch.strips + strips;
    scratch.d_codes = scratch.tile + tile;
    scratch.kept = reinterpret_cast<std::int64_t*>(scratch.d_codes + F * row);
    METAPRUNE_CALL(isa, update_generators(args, scratch, d_codes, begin, end));
}

}  // namespace metaprune
