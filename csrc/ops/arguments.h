// What the registration of every op needs: checks of its arguments and the types behind them.
//
// An op can be called without its public function: whatever could make a kernel read or write out of bounds
// is checked here again.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "storage.h"

namespace metaprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void expect_here(const char* name, bool here, const Tensor& tensor, ScalarType dtype,
                        std::initializer_list<std::int64_t> shape) {
    bool matches = here && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                   tensor.dim() == static_cast<std::int64_t>(shape.size());
    std::int64_t axis = 0;
    for (const std::int64_t size : shape) matches = matches && tensor.size(axis++) == size;
    STD_TORCH_CHECK(matches, name, " has a shape, dtype, device or strides this kernel does not take");
}

inline void expect(const char* name, const Tensor& tensor, ScalarType dtype,
                   std::initializer_list<std::int64_t> shape) {
    expect_here(name, tensor.is_cpu(), tensor, dtype, shape);
}

inline const std::int32_t* expect_integers(const char* name, const Tensor& tensor, std::int64_t S,
                                           std::int64_t low, std::int64_t high) {
    expect(name, tensor, ScalarType::Int, {S});
    const auto* values = tensor.const_data_ptr<std::int32_t>();
    for (std::int64_t s = 0; s < S; ++s) {
        STD_TORCH_CHECK(values[s] >= low && values[s] <= high, name, "[", s, "] is ", values[s],
                        "; legal values are ", low, "..", high);
    }
    return values;
}

inline const std::int32_t* expect_widths(const char* name, const Tensor& tensor, std::int64_t S,
                                         std::int64_t limit) {
    return expect_integers(name, tensor, S, 1, limit);
}

inline const std::int32_t* expect_slots(const char* name, const Tensor& tensor, std::int64_t S,
                                        std::int64_t slots) {
    return expect_integers(name, tensor, S, 0, slots - 1);
}

template <typename T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tensor in another dtype, or itself: a call of PyTorch's costs microseconds even where there is nothing
// to do.
inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
    return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Calls function(T{}) with the storage type of `tensor`.
template <typename Function>
auto with_storage_type(const char* op, const Tensor& tensor, const Function& function) {
    const ScalarType dtype = tensor.scalar_type();
    if (dtype == ScalarType::BFloat16) return function(BFloat16{});
    STD_TORCH_CHECK(dtype == ScalarType::Float, op, " on the CPU takes float32 and bfloat16 only");
    return function(float{});
}

}  // namespace metaprune
