#include "peak.h"

#include <chrono>

#include "storage.h"

#define METAPRUNE_BODY "peak.inc"
#include "for_each_isa.h"

namespace metaprune {
namespace {

void work(Isa isa, std::int64_t rounds, bool pairs, bool tiles, volatile float* sink, double* operations) {
    METAPRUNE_CALL(isa, work(rounds, pairs, tiles, sink, operations));
}

}  // namespace

double peak_flops(Isa isa, double seconds, bool bf16) {
    using Clock = std::chrono::steady_clock;
    constexpr std::int64_t kRounds = 1 << 16;
    volatile float sink = 0.0f;
    double operations = 0.0, passed = 0.0;
    const auto began = Clock::now();
    while (passed < seconds) {
        double of_round = 0.0;
        work(isa, kRounds, bf16, bf16 && isa == Isa::amx, &sink, &of_round);
        operations += kRounds * of_round;
        passed = std::chrono::duration<double>(Clock::now() - began).count();
    }
    return operations / passed;
}

}  // namespace metaprune
