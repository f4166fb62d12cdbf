#include "update_generators.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "workspace.h"

namespace metaprune {
namespace {

// A run is a panel of output channels and this many rows of each, so few that what they add to a sum may be
// summed in float.
constexpr std::int64_t kStrip = 256;

// Working memory of one thread. A strip is what one crop has of a run: [kPanel, kStrip].
struct Scratch {
    float* strips;       // [F, kPanel, kStrip]
    float* weights;      // [kPanel, kStrip], of one subnetwork
    float* sums;         // [F, H]
    std::int64_t* kept;  // [kPanel, F], the factors whose crop holds some of an output channel's rows
};

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "update_generators.inc"
#include "for_each_isa.h"

namespace metaprune {
namespace {

Scratch make_scratch(std::int64_t factors, std::int64_t H) {
    const auto F = static_cast<std::size_t>(factors), strip = static_cast<std::size_t>(kPanel * kStrip);
    const std::size_t floats = (F + 1) * strip + F * static_cast<std::size_t>(H);
    std::byte* memory = workspace(kPanel * F * sizeof(std::int64_t) + floats * sizeof(float) + 64);
    Scratch scratch{};
    scratch.strips = reinterpret_cast<float*>(memory);
    scratch.weights = scratch.strips + F * strip;
    scratch.kept = reinterpret_cast<std::int64_t*>(scratch.weights + strip);
    scratch.sums = reinterpret_cast<float*>(scratch.kept + kPanel * F);
    return scratch;
}

}  // namespace

void generate_delayed(Isa isa, const GenerateDelayed& args, std::int64_t begin, std::int64_t end) {
    METAPRUNE_CALL(isa, generate_delayed(args, make_scratch(0, args.generator.H), begin, end));
}

void update_generators(Isa isa, const UpdateGenerators& args, double* sums, std::int64_t begin,
                       std::int64_t end) {
    const Scratch scratch = make_scratch(args.F, args.generator.H);
    METAPRUNE_CALL(isa, update_generators(args, scratch, sums, begin, end));
}

}  // namespace metaprune
