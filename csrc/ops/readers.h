// Who reads each slot of a buffer: the gradient of a slot is the sum of its readers'.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"

namespace metaprune {

struct Readers {
    std::vector<std::int32_t> first;    // [slots + 1], of each slot in `readers`
    std::vector<std::int32_t> readers;  // [S], subnetworks by slot, those of one slot in ascending order

    std::int64_t slots() const { return static_cast<std::int64_t>(first.size()) - 1; }
    std::int64_t count(std::int64_t slot) const { return first[slot + 1] - first[slot]; }
    // The first reader of a slot, -1 if it has none.
    std::int64_t any(std::int64_t slot) const { return count(slot) == 0 ? -1 : readers[first[slot]]; }
};

// source [S] names the slot of each subnetwork. Readers of one slot must have the same of `channels` [S].
inline Readers readers_of(const std::int32_t* source, std::int64_t S, std::int64_t slots, const char* name,
                          const std::int32_t* channels) {
    Readers found;
    found.first.assign(static_cast<std::size_t>(slots) + 1, 0);
    for (std::int64_t s = 0; s < S; ++s) ++found.first[source[s] + 1];
    for (std::int64_t slot = 0; slot < slots; ++slot) found.first[slot + 1] += found.first[slot];
    std::vector<std::int32_t> next(found.first.begin(), found.first.end() - 1);
    found.readers.resize(static_cast<std::size_t>(S));
    for (std::int64_t s = 0; s < S; ++s) {
        const std::int32_t reader = next[source[s]]++, before = found.first[source[s]];
        found.readers[reader] = static_cast<std::int32_t>(s);
        const std::int32_t other = found.readers[before];
        STD_TORCH_CHECK(channels[s] == channels[other], name, "[", s, "] is ", channels[s],
                        "; that of subnetwork ", other, ", which reads the same slot, is ", channels[other]);
    }
    return found;
}

// Elements of activations of so many pixels in all slots that somebody reads.
inline std::int64_t elements_read(const Readers& readers, const std::int32_t* channels, std::int64_t pixels) {
    std::int64_t width = 0;
    for (std::int64_t l = 0; l < readers.slots(); ++l) {
        if (readers.count(l) > 0) width += round_up(channels[readers.any(l)], 8);
    }
    return width * pixels;
}

// Zero for the slots of a gradient that nobody reads.
template <typename T>
void clear_unread(T* buffer, std::int64_t slot, const Readers& readers) {
    for (std::int64_t l = 0; l < readers.slots(); ++l) {
        if (readers.count(l) == 0) std::fill_n(buffer + l * slot, slot, T{});
    }
}

}  // namespace metaprune
