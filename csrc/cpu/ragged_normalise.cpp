#include "ragged_normalise.h"

#include <cstddef>
#include <cstdint>

#include "workspace.h"

namespace metaprune {
namespace {

// Scale and shift of one subnetwork, ready for whole registers.
struct Pattern {
    float *scale, *shift;
};

// Floats before a pattern repeats, at least: a few registers, to make a loop worth its while.
constexpr std::int64_t kShortestPattern = 64;

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "ragged_normalise.inc"
#include "for_each_isa.h"

namespace metaprune {

template <typename T>
void ragged_normalise(Isa isa, const RaggedNormalise<T>& args, std::int64_t begin, std::int64_t end) {
    const std::int64_t longest = kShortestPattern + 4 * round_up(args.max_channels, 8);
    auto* floats = reinterpret_cast<float*>(workspace(2 * longest * sizeof(float)));
    METAPRUNE_CALL(isa, ragged_normalise(args, Pattern{floats, floats + longest}, begin, end));
}

#define INSTANTIATE(T) \
    template void ragged_normalise(Isa, const RaggedNormalise<T>&, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace metaprune
