// Large tensors in memory that is used again: fresh memory costs a page fault for every 4 KB.

#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace metaprune {

// An uninitialised tensor on the CPU. Large ones lie in segments that a pool cuts up and joins again when the
// tensors die. What it holds beyond twice the peak of the tensors alive goes back to the system, unless a
// tensor lies in the same segment.
Tensor new_buffer(const Tensor& like, const std::vector<std::int64_t>& shape);

// One of floats.
Tensor new_floats(const Tensor& like, const std::vector<std::int64_t>& shape);

// Whether a result of so many bytes is written past the caches: it is read from memory anyway.
inline bool past_caches(std::int64_t bytes) { return bytes > 8 << 20; }

}  // namespace metaprune
