// What the registration of every op on a GPU needs: checks of its arguments, and where to queue its kernels.
//
// Numbers in tensors, channel counts among them, stay on the device: only shapes, dtypes and places are
// checked. With METAPRUNE_EMULATED the same registration takes tensors of the CPU, for kernels built by a C++
// compiler (cuda/emulated.h): a library of the tests.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "../activations.h"
#include "../arguments.h"

#ifdef METAPRUNE_EMULATED
#define METAPRUNE_GPU CPU
#else
#define METAPRUNE_GPU CUDA

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Declared by shim.h for those who compile with the headers of CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** ret_stream);
#endif

namespace metaprune::cuda {

// The current stream of a tensor's device, which is the current device for as long as this lives.
class Queue {
  public:
#ifdef METAPRUNE_EMULATED
    explicit Queue(const Tensor&) {}
#else
    explicit Queue(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
    }
#endif
    void* stream() const { return stream_; }

  private:
    void* stream_ = nullptr;
#ifndef METAPRUNE_EMULATED
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Raises what a launch answered.
inline void expect_launched(const char* op, const char* wrong) {
    STD_TORCH_CHECK(wrong == nullptr, op, " was not launched: ", wrong == nullptr ? "" : wrong);
}

// Calls function(T{}) with the storage type of `tensor`.
template <typename Function>
auto with_gpu_storage_type(const char* op, const Tensor& tensor, const Function& function) {
    const ScalarType dtype = tensor.scalar_type();
    if (dtype == ScalarType::BFloat16) return function(BFloat16{});
    if (dtype == ScalarType::Half) return function(Float16{});
    STD_TORCH_CHECK(dtype == ScalarType::Float, op, " on a GPU takes float32, bfloat16 and float16 only");
    return function(float{});
}

// Checks of tensors that must lie beside x.
class Beside {
  public:
    explicit Beside(const Tensor& x) : x_(x), dtype_(x.scalar_type()) {
#ifdef METAPRUNE_EMULATED
        STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
#else
        STD_TORCH_CHECK(x.is_cuda(), "x must be on a GPU");
#endif
    }

    void expect(const char* name, const Tensor& tensor, ScalarType dtype,
                std::initializer_list<std::int64_t> shape) const {
        const bool here = tensor.is_cpu() == x_.is_cpu() &&
                          (x_.is_cpu() || tensor.get_device_index() == x_.get_device_index());
        expect_here(name, here, tensor, dtype, shape);
    }

    // int32 [S].
    const std::int32_t* integers(const char* name, const Tensor& tensor, std::int64_t S) const {
        expect(name, tensor, ScalarType::Int, {S});
        return tensor.const_data_ptr<std::int32_t>();
    }

    // A buffer [slots, slot] of the dtype of x, read 16 bytes at a time.
    template <typename T>
    const T* buffer(const char* name, const Tensor& tensor, std::int64_t slot) const {
        STD_TORCH_CHECK(tensor.dim() == 2, name, " must be [slots, ", slot, "]");
        expect(name, tensor, dtype_, {tensor.size(0), slot});
        const T* values = data<T>(tensor);
        STD_TORCH_CHECK(reinterpret_cast<std::uintptr_t>(values) % 16 == 0, name,
                        " must begin at a multiple of 16 bytes");
        return values;
    }

    // Parameters in float32 or in the dtype of x, as float32.
    Tensor floats(const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape) const {
        expect(name, tensor, tensor.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype_, shape);
        return torch::stable::to(tensor, ScalarType::Float);
    }
    std::optional<Tensor> floats(const char* name, const std::optional<Tensor>& tensor,
                                 std::initializer_list<std::int64_t> shape) const {
        if (!tensor) return std::nullopt;
        return floats(name, *tensor, shape);
    }

  private:
    const Tensor& x_;
    ScalarType dtype_;
};

inline const float* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? data<float>(*tensor) : nullptr;
}

// A number that a kernel counts in 32 bits.
inline std::int32_t expect_32_bits(const char* name, std::int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<std::int32_t>::max(), name, " is ", value,
                    ", more than a kernel counts");
    return static_cast<std::int32_t>(value);
}

// S, which is a dimension of the grid.
inline std::int32_t expect_gpu_count(const char* name, const Tensor& tensor) {
    constexpr std::int64_t kLimit = 65535;
    const std::int64_t S = expect_count(name, tensor);
    STD_TORCH_CHECK(S <= kLimit, name, " has ", S, " subnetworks; a GPU takes ", kLimit, " at once");
    return static_cast<std::int32_t>(S);
}

}  // namespace metaprune::cuda
