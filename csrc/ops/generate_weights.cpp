// Registers generate_weights on the CPU. Schema, fake kernel and gradient are declared in kernels/ops.py.

#include "generate_weights.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "buffers.h"

namespace metaprune {
namespace {

float widen(float value) { return value; }
float widen(BFloat16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }

// The checked arguments of both directions of generate_weights, and what their pointers need kept alive.
template <typename T>
struct GenerateWeightsInputs {
    GenerateWeights<T> args{};
    std::vector<float> codes;

    GenerateWeightsInputs(const Tensor& basis, const Tensor& codes_SH, const Tensor& cin, const Tensor& cout,
                          bool depthwise) {
        STD_TORCH_CHECK(basis.dim() == 4 && codes_SH.dim() == 2,
                        "basis must be [O, I, K, H] and codes [S, H]");
        const std::int64_t S = codes_SH.size(0), O = basis.size(0), I = basis.size(1), K = basis.size(2),
                           H = basis.size(3);
        const ScalarType dtype = basis.scalar_type();
        expect("basis", basis, dtype, {O, I, K, H});
        expect("codes", codes_SH, dtype, {S, H});
        STD_TORCH_CHECK(S * O * I * K > 0, "basis and codes must not be empty, but for H");
        STD_TORCH_CHECK(!depthwise || I == 1, "a depthwise basis must be [C, 1, K, H]");

        args.S = S;
        args.O = O;
        args.I = depthwise ? K : I;
        args.K = depthwise ? 1 : K;
        args.H = H;
        args.basis = data<T>(basis);
        args.depthwise = depthwise;
        args.cout = expect_widths("cout", cout, S, O);
        if (!depthwise) args.cin = expect_widths("cin", cin, S, I);
        args.slot = depthwise ? K * round_up(O, 8) : round_up(O, kPanel) * K * round_up(I, kPerWord<T>);

        codes.assign(S * padded_hidden(H), 0.0f);
        for (std::int64_t s = 0; s < S; ++s) {
            std::transform(data<T>(codes_SH) + s * H, data<T>(codes_SH) + (s + 1) * H,
                           codes.begin() + s * padded_hidden(H), [](T code) { return widen(code); });
        }
        args.codes = codes.data();
    }

    // Blocks a thread should take at least: about a million multiply-adds.
    std::int64_t grain() const {
        return 1 + 1000000 * kBlocks / (args.S * args.O * args.I * args.K * (args.H + 1));
    }
};

Tensor generate_weights_cpu(const Tensor& basis, const Tensor& bias, const Tensor& codes, const Tensor& cin,
                            const Tensor& cout, bool depthwise) {
    return with_storage_type("generate_weights", basis, [&](auto storage) {
        using T = decltype(storage);
        GenerateWeightsInputs<T> inputs(basis, codes, cin, cout, depthwise);
        expect("bias", bias, basis.scalar_type(), {basis.size(0), basis.size(1), basis.size(2)});
        inputs.args.bias = data<T>(bias);
        const Tensor weight = new_buffer(basis, {inputs.args.S, inputs.args.slot});
        T* to = mutable_data<T>(weight);
        const Isa isa = chosen_isa();
        torch::stable::parallel_for(0, kBlocks, inputs.grain(), [&](std::int64_t begin, std::int64_t end) {
            generate_weights(isa, inputs.args, to, begin, end);
        });
        return weight;
    });
}

std::tuple<Tensor, Tensor, Tensor> generate_weights_backward_cpu(const Tensor& grad, const Tensor& basis,
                                                                 const Tensor& codes, const Tensor& cin,
                                                                 const Tensor& cout, bool depthwise) {
    return with_storage_type("generate_weights_backward", basis, [&](auto storage) {
        using T = decltype(storage);
        const GenerateWeightsInputs<T> inputs(basis, codes, cin, cout, depthwise);
        const std::int64_t S = inputs.args.S, H = inputs.args.H, hidden = padded_hidden(H);
        expect("grad", grad, basis.scalar_type(), {S, inputs.args.slot});

        const Tensor d_basis = torch::stable::empty_like(basis);
        const Tensor d_bias = torch::stable::new_empty(basis, {basis.size(0), basis.size(1), basis.size(2)});
        std::vector<float> partial(kBlocks * S * hidden);
        const GenerateWeightsGradients<T> gradients{data<T>(grad), mutable_data<T>(d_basis),
                                                    mutable_data<T>(d_bias), partial.data()};
        const Isa isa = chosen_isa();
        torch::stable::parallel_for(0, kBlocks, inputs.grain(), [&](std::int64_t begin, std::int64_t end) {
            generate_weights_backward(isa, inputs.args, gradients, begin, end);
        });

        const Tensor d_codes = torch::stable::new_empty(codes, {S, H}, ScalarType::Float);
        auto* total = mutable_data<float>(d_codes);
        for (std::int64_t s = 0; s < S; ++s) {
            for (std::int64_t h = 0; h < H; ++h) {
                total[s * H + h] = 0.0f;
                for (std::int64_t block = 0; block < kBlocks; ++block)
                    total[s * H + h] += partial[(block * S + s) * hidden + h];
            }
        }
        return std::tuple(d_basis, d_bias, torch::stable::to(d_codes, basis.scalar_type()));
    });
}

}  // namespace
}  // namespace metaprune

STABLE_TORCH_LIBRARY_IMPL(metaprune, CPU, m) {
    m.impl("generate_weights", TORCH_BOX(&metaprune::generate_weights_cpu));
    m.impl("generate_weights_backward", TORCH_BOX(&metaprune::generate_weights_backward_cpu));
}
