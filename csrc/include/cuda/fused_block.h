// fused_block on a GPU over raw pointers, all of them of the device. The maths is in
// kernels/fused_block/README.md, the layouts in kernels/layout.py.

#pragma once

#include <cstddef>

#include "convolution.h"

namespace metaprune::cuda {

// Why this kernel does not compute a block, or null. It computes [1×1,] depthwise 3×3 of stride 1 or 2, 1×1,
// with scale and shift after each; an expansion of at most 256 channels.
template <typename T>
const char* why_not_fused(const Chain<T>& chain);

// Queues the kernel on a stream of the current device; null, or what is wrong.
template <typename T>
const char* fused_block(const Chain<T>& chain, void* stream);

}  // namespace metaprune::cuda
