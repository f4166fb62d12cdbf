// Registers generate_weights on the CPU. Schema, fake kernel and gradient are declared in kernels/ops.py.

#include "generate_weights.h"

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace metaprune {
namespace {

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
