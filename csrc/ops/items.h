// Work dealt out to torch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace metaprune {

// Calls run(begin, end) for pieces of [0, count) on torch's threads. A thread that is done takes the next
// piece: items may cost very different amounts.
template <typename Run>
void for_each_item(std::int64_t count, const Run& run) {
    constexpr std::int64_t kPiecesPerThread = 16;
    const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
    const std::int64_t piece = 1 + count / (threads * kPiecesPerThread);
    std::atomic<std::int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
        for (std::int64_t begin = next.fetch_add(piece); begin < count; begin = next.fetch_add(piece)) {
            run(begin, begin + piece < count ? begin + piece : count);
        }
    });
}

}  // namespace metaprune
