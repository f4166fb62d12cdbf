// Work dealt out to torch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace metaprune {

// Calls run(begin, end) for pieces of [0, count) on torch's threads. A thread that is done takes the next
// piece: items may cost very different amounts. Pieces get smaller, so that all threads are done at once.
template <typename Run>
void for_each_item(std::int64_t count, const Run& run) {
    constexpr std::int64_t kTurns = 4;  // of all threads, that take nearly two thirds of what is left
    const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
    std::atomic<std::int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
        std::int64_t begin = next.load();
        while (begin < count) {
            const std::int64_t end = begin + 1 + (count - begin - 1) / (threads * kTurns);
            if (!next.compare_exchange_weak(begin, end)) continue;
            run(begin, end);
            begin = next.load();
        }
    });
}

}  // namespace metaprune
