// Large tensors in memory that is used again: fresh memory costs a page fault for every 4 KB.

#pragma once

#include <initializer_list>

#include "arguments.h"

namespace metaprune {

// An uninitialised tensor on the CPU. Large ones lie in blocks that go back to a pool when the tensor dies.
// The pool and the tensors alive together never hold more than twice what the tensors alive held at their
// peak.
Tensor new_buffer(const Tensor& like, std::initializer_list<std::int64_t> shape);

}  // namespace metaprune
