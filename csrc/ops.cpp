// Registers the CPU kernels with torch. Schemas, fake kernels and gradients are declared in kernels/ops.py.
//
// An op can be called without its public function: whatever could make a kernel read or write out of bounds
// is checked here again.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "generate_weights.h"

namespace metaprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void expect(const char* name, const Tensor& tensor, ScalarType dtype,
            std::initializer_list<std::int64_t> shape) {
    bool matches = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                   tensor.dim() == static_cast<std::int64_t>(shape.size());
    std::int64_t axis = 0;
    for (const std::int64_t size : shape) matches = matches && tensor.size(axis++) == size;
    STD_TORCH_CHECK(matches, name, " has a shape, dtype, device or strides this kernel does not take");
}

const std::int32_t* expect_widths(const char* name, const Tensor& tensor, std::int64_t S,
                                  std::int64_t limit) {
    expect(name, tensor, ScalarType::Int, {S});
    const auto* widths = tensor.const_data_ptr<std::int32_t>();
    for (std::int64_t s = 0; s < S; ++s) {
        STD_TORCH_CHECK(widths[s] >= 1 && widths[s] <= limit, name, "[", s, "] is ", widths[s],
                        "; legal values are 1..", limit);
    }
    return widths;
}

template <typename T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls function(T{}) with the storage type of `tensor`.
template <typename Function>
auto with_storage_type(const char* op, const Tensor& tensor, const Function& function) {
    const ScalarType dtype = tensor.scalar_type();
    if (dtype == ScalarType::BFloat16) return function(BFloat16{});
    STD_TORCH_CHECK(dtype == ScalarType::Float, op, " on the CPU takes float32 and bfloat16 only");
    return function(float{});
}

// The checked arguments of both directions of generate_weights, and what their pointers need kept alive.
template <typename T>
struct GenerateWeightsInputs {
    GenerateWeights<T> args{};
    Tensor codes;
    std::vector<std::int32_t> ones;

    GenerateWeightsInputs(const Tensor& basis, const Tensor& codes_SH, const Tensor& cin, const Tensor& cout,
                          bool depthwise, const std::optional<Tensor>& scale) {
        STD_TORCH_CHECK(basis.dim() == 4 && codes_SH.dim() == 2,
                        "basis must be [O, I, K, H] and codes [S, H]");
        const std::int64_t S = codes_SH.size(0), O = basis.size(0), I = basis.size(1), H = basis.size(3);
        const ScalarType dtype = basis.scalar_type();
        expect("basis", basis, dtype, {O, I, basis.size(2), H});
        expect("codes", codes_SH, dtype, {S, H});
        if (scale) expect("scale", *scale, dtype, {S, O});
        STD_TORCH_CHECK(!depthwise || I == 1, "a depthwise basis must be [C, 1, K, H]");

        codes = torch::stable::pad(torch::stable::to(codes_SH, ScalarType::Float), {0, padded_hidden(H) - H});
        args.S = S;
        args.O = depthwise ? 1 : O;
        args.I = depthwise ? O : I;
        args.K = basis.size(2);
        args.H = H;
        args.basis = data<T>(basis);
        args.codes = data<float>(codes);
        args.scale = scale ? data<T>(*scale) : nullptr;
        args.depthwise = depthwise;
        args.cout = expect_widths("cout", cout, S, O);
        if (depthwise) {
            ones.assign(S, 1);
            args.cin = std::exchange(args.cout, ones.data());
        } else {
            args.cin = expect_widths("cin", cin, S, I);
        }
        args.slot = args.O * args.K * ((args.I + 7) / 8 * 8);
    }

    // Blocks a thread should take at least: about a hundred thousand multiply-adds.
    std::int64_t grain() const { return 1 + 100000 * kBlocks / (args.S * args.O * args.I * args.K * args.H); }
};

Tensor generate_weights_cpu(const Tensor& basis, const Tensor& bias, const Tensor& codes, const Tensor& cin,
                            const Tensor& cout, bool depthwise, const std::optional<Tensor>& scale) {
    return with_storage_type("generate_weights", basis, [&](auto storage) {
        using T = decltype(storage);
        GenerateWeightsInputs<T> inputs(basis, codes, cin, cout, depthwise, scale);
        expect("bias", bias, basis.scalar_type(), {basis.size(0), basis.size(1), basis.size(2)});
        inputs.args.bias = data<T>(bias);
        const Tensor weight = torch::stable::new_empty(basis, {inputs.args.S, inputs.args.slot});
        const Isa isa = chosen_isa();
        torch::stable::parallel_for(0, kBlocks, inputs.grain(), [&](std::int64_t begin, std::int64_t end) {
            generate_weights(isa, inputs.args, mutable_data<T>(weight), begin, end);
        });
        return weight;
    });
}

std::tuple<Tensor, Tensor, Tensor> generate_weights_backward_cpu(const Tensor& grad, const Tensor& basis,
                                                                 const Tensor& codes, const Tensor& cin,
                                                                 const Tensor& cout, bool depthwise,
                                                                 const std::optional<Tensor>& scale) {
    return with_storage_type("generate_weights_backward", basis, [&](auto storage) {
        using T = decltype(storage);
        const GenerateWeightsInputs<T> inputs(basis, codes, cin, cout, depthwise, scale);
        const std::int64_t S = inputs.args.S, H = inputs.args.H, hidden = padded_hidden(H);
        expect("grad", grad, basis.scalar_type(), {S, inputs.args.slot});

        const Tensor d_basis = torch::stable::empty_like(basis);
        const Tensor d_bias = torch::stable::new_empty(basis, {basis.size(0), basis.size(1), basis.size(2)});
        const Tensor partial = torch::stable::new_zeros(basis, {kBlocks, S, hidden}, ScalarType::Float);
        const GenerateWeightsGradients<T> gradients{data<T>(grad), mutable_data<T>(d_basis),
                                                    mutable_data<T>(d_bias), mutable_data<float>(partial)};
        const Isa isa = chosen_isa();
        torch::stable::parallel_for(0, kBlocks, inputs.grain(), [&](std::int64_t begin, std::int64_t end) {
            generate_weights_backward(isa, inputs.args, gradients, begin, end);
        });

        float* total = gradients.codes;
        for (std::int64_t block = 1; block < kBlocks; ++block) {
            for (std::int64_t j = 0; j < S * hidden; ++j) total[j] += gradients.codes[block * S * hidden + j];
        }
        Tensor sum = torch::stable::select(partial, 0, 0);
        const Tensor d_codes = torch::stable::to(torch::stable::narrow(sum, 1, 0, H), basis.scalar_type());
        return std::tuple(d_basis, d_bias, torch::stable::contiguous(d_codes));
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("generate_weights", TORCH_BOX(&metaprune::generate_weights_cpu));
    m.impl("generate_weights_backward", TORCH_BOX(&metaprune::generate_weights_backward_cpu));
}
