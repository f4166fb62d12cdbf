// Checks of buffers of activations and of what goes with them.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "arguments.h"
#include "clamp.h"
#include "storage.h"

namespace metaprune {

// S, told by one of the tensors [S].
inline std::int64_t expect_count(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) >= 1, name, " must be [S] with S at least 1");
    return tensor.size(0);
}

inline void expect_window(std::int64_t kernel, std::int64_t stride) {
    constexpr std::int64_t kLimit = 1 << 15;
    STD_TORCH_CHECK(kernel >= 1 && kernel <= kLimit && stride >= 1 && stride <= kLimit,
                    "kernel and stride must be 1..", kLimit);
}

// Elements of one slot, image being (N, H, W).
inline std::int64_t expect_slot(const std::vector<std::int64_t>& image, std::int64_t max_channels) {
    constexpr std::int64_t kLimit = std::numeric_limits<std::int32_t>::max();
    STD_TORCH_CHECK(image.size() == 3, "image must be (N, H, W)");
    STD_TORCH_CHECK(max_channels >= 1 && max_channels <= kLimit, "max channels is ", max_channels,
                    "; legal values are 1..", kLimit);
    std::int64_t slot = round_up(max_channels, 8);
    for (const std::int64_t size : image) {
        STD_TORCH_CHECK(size >= 1 && !__builtin_mul_overflow(slot, size, &slot), "image has the size ", size,
                        ", which no buffer has");
    }
    return slot;
}

// Slots of a buffer [slots, slot].
inline std::int64_t expect_buffer(const char* name, const Tensor& tensor, ScalarType dtype,
                                  std::int64_t slot) {
    STD_TORCH_CHECK(tensor.dim() == 2, name, " must be [slots, ", slot, "]");
    expect(name, tensor, dtype, {tensor.size(0), slot});
    return tensor.size(0);
}

// Parameters in float32 or in the dtype of the activations, as float32.
inline Tensor expect_floats(const char* name, const Tensor& tensor, ScalarType dtype,
                            std::initializer_list<std::int64_t> shape) {
    expect(name, tensor, tensor.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype, shape);
    return in_dtype(tensor, ScalarType::Float);
}

inline Clamp expect_activation(const std::string& activation) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (activation == "none") return {-kInfinity, kInfinity};
    if (activation == "relu") return {0.0f, kInfinity};
    STD_TORCH_CHECK(activation == "relu6", "activation must be none, relu or relu6, got ", activation);
    return {0.0f, 6.0f};
}

}  // namespace metaprune
