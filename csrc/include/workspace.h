// Working memory of a thread, kept between calls.

#pragma once

#include <cstddef>

namespace metaprune {

// At least `bytes` of memory aligned to 64 bytes, the same memory at every call of a thread: whatever an
// earlier call returned is void. Its contents are unspecified. Throws std::bad_alloc.
std::byte* workspace(std::size_t bytes);

}  // namespace metaprune
