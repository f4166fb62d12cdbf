#include "update_generators.h"

#include <cstddef>
#include <cstdint>

#include "workspace.h"

namespace metaprune {
namespace {

// Rows of a strip: of one output channel, so few that what they add to a code's gradient may be summed in
// float.
constexpr std::int64_t kStrip = 256;

// Working memory of one thread.
struct Strip {
    float* grads;              // [S, kStrip], zero beyond a crop
    float* d_codes;            // [S, H]
    std::int64_t* subnetwork;  // [S], those whose crop holds some of the strip
    std::int64_t count;        // of them
};

}  // namespace
}  // namespace metaprune

#define METAPRUNE_BODY "update_generators.inc"
#include "for_each_isa.h"

namespace metaprune {

void update_generators(Isa isa, const UpdateGenerators& args, double* d_codes, std::int64_t begin,
                       std::int64_t end) {
    const auto S = static_cast<std::size_t>(args.S), H = static_cast<std::size_t>(args.H);
    std::byte* memory = workspace(S * (sizeof(std::int64_t) + (kStrip + H) * sizeof(float)));
    auto* subnetwork = reinterpret_cast<std::int64_t*>(memory);
    auto* grads = reinterpret_cast<float*>(subnetwork + S);
    const Strip strip{grads, grads + S * kStrip, subnetwork, 0};
    METAPRUNE_CALL(isa, update_generators(args, strip, d_codes, begin, end));
}

}  // namespace metaprune
